// Add a gated branch to a row, normalize it, modulate or rotate it and store it in bf16 or e4m3.
//
//     x' = x + branch · gate
//     y = (x' − mean) · rstd · (OFFSET + gain) + bias
//
// With ROTATE, channels 2i and 2i + 1 of each head of 128 then turn by the token's i-th angle.
//
// A team of TEAM warps takes a row and keeps it in registers; or two, ROWS, without a branch, where
// gain and bias are those of both and are read once. CHANNELS is a multiple of 256 · TEAM. BRANCH,
// GATE, GAIN and BIAS say which of them there are; without GAIN, OFFSET + gain is 1. OUTPUT: 0 none,
// 1 bf16, 2 e4m3 with a scale per 128 channels. PROGRAMS share a multiprocessor at least.
//
// No array that is read is written through another name; __restrict__ says so, or each load would
// wait for the store before it.

constexpr int STRIDE = 256 * TEAM, CHUNKS = CHANNELS / STRIDE;  // channels per step, steps

typedef float Places[2][2 * ROWS][WARPS];  // of a program: for two sums, one after the other

// Sums of N numbers over a team's lanes. Lanes share the work: with each exchange a lane keeps half
// of its numbers and gives away the other half.
template <int N> DEVICE void team_sums(float (&x)[N], float (&places)[2 * ROWS][WARPS]) {
#if TEAM == 1
#pragma unroll
    for (int n = 0; n < N; n++) x[n] = warp_sum(x[n]);
#else
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int lanes = 16;
#pragma unroll
    for (int n = N / 2; n; n >>= 1, lanes >>= 1)
#pragma unroll
        for (int i = 0; i < n; i++) {
            const float given = lane & lanes ? x[i] : x[i + n];
            x[i] = (lane & lanes ? x[i + n] : x[i]) + __shfl_xor_sync(0xffffffffu, given, lanes);
        }
#pragma unroll
    for (; lanes; lanes >>= 1) x[0] += __shfl_xor_sync(0xffffffffu, x[0], lanes);
    if (lane % (32 / N) == 0) places[lane / (32 / N)][warp] = x[0];
    asm volatile("bar.sync %0, %1;" ::"r"(warp / TEAM + 1), "n"(32 * TEAM) : "memory");
#pragma unroll
    for (int n = 0; n < N; n++) {
        x[n] = 0.0f;
#pragma unroll
        for (int i = 0; i < TEAM; i++) x[n] += places[n][warp / TEAM * TEAM + i];
    }
#endif
}

// Makes the compiler forget what it unpacked, so that only the packed rows stay in registers and
// many programs can share a multiprocessor.
DEVICE void stay_packed(Chunk (&kept)[ROWS][CHUNKS]) {
#if PROGRAMS > 2 || ROWS > 1
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) asm volatile("" : "+r"(kept[r][c].pairs[i]));
#endif
}

// 1 / √(variance + eps) of each row, and −mean times that; without CENTERED the mean is taken as 0.
// Squares are summed as they are. Where most of them is the mean's, what is left has lost digits: the
// team then sums them again, about the mean, of the rows in memory, so that few registers are needed.
DEVICE void measure(const Chunk (&kept)[ROWS][CHUNKS], const u16 *rows, long long row_stride,
                    float eps, float (&rstd)[ROWS], float (&offset)[ROWS], Places &places) {
    float sums[(1 + CENTERED) * ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            float values[8];
            unpack(kept[r][c], values);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sums[r] = fmaf(values[i], values[i], sums[r]);
                if (CENTERED) sums[r + CENTERED * ROWS] += values[i];
            }
        }
    team_sums(sums, places[0]);
    float means[ROWS], variances[ROWS];
    bool lost = false;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float square = sums[r] * (1.0f / CHANNELS);
        means[r] = CENTERED ? sums[r + CENTERED * ROWS] * (1.0f / CHANNELS) : 0.0f;
        variances[r] = fmaf(-means[r], means[r], square);
        lost |= variances[r] < square * (1.0f / 32.0f);
    }
    if (CENTERED && lost) {
        float again[ROWS] = {};
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll 1
            for (int c = 0; c < CHUNKS; c++) {
                float values[8];
                unpack(*(const Chunk *)(rows + r * row_stride + STRIDE * c), values);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const float apart = values[i] - means[r];
                    again[r] = fmaf(apart, apart, again[r]);
                }
            }
        team_sums(again, places[1]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) variances[r] = again[r] * (1.0f / CHANNELS);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        rstd[r] = rsqrtf(variances[r] + eps);
        offset[r] = -means[r] * rstd[r];
    }
}

#if OUTPUT == 2
// Quantizes 128 channels of each row, which lie in 16 neighbouring lanes. Of several rows, each
// finds its scale in a part of these lanes, in order. Returns the lane's scale.
DEVICE float quantize_rows(const float (&values)[ROWS][8], u32 (&quantized)[ROWS][2], int lane) {
    float largest[ROWS] = {}, factors[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < 8; i++) largest[r] = fmaxf(largest[r], fabsf(values[r][i]));
    int lanes = 8;
#pragma unroll
    for (int n = ROWS / 2; n; n >>= 1, lanes >>= 1)
#pragma unroll
        for (int i = 0; i < n; i++) {
            const float given = lane & lanes ? largest[i] : largest[i + n];
            largest[i] = fmaxf(lane & lanes ? largest[i + n] : largest[i],
                               __shfl_xor_sync(0xffffffffu, given, lanes));
        }
#pragma unroll
    for (; lanes; lanes >>= 1)
        largest[0] = fmaxf(largest[0], __shfl_xor_sync(0xffffffffu, largest[0], lanes));
    const float step = e4m3_step(largest[0], factors[0]);
    lanes = 16 / ROWS;
#pragma unroll
    for (int n = 1; n < ROWS; n <<= 1, lanes <<= 1)
#pragma unroll
        for (int i = 0; i < n; i++) {
            const float other = __shfl_xor_sync(0xffffffffu, factors[i], lanes);
            factors[i + n] = lane & lanes ? factors[i] : other;
            factors[i] = lane & lanes ? other : factors[i];
        }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            quantized[r][i] = pack_e4m3(
                values[r][4 * i] * factors[r], values[r][4 * i + 1] * factors[r],
                values[r][4 * i + 2] * factors[r], values[r][4 * i + 3] * factors[r]);
    return step;
}
#endif

#if ROTATE
// A lane's four pairs: the same ones of a head in all of its chunks.
DEVICE void rotate(float (&values)[8], const float4 &cos, const float4 &sin) {
    const float c[4] = {cos.x, cos.y, cos.z, cos.w}, s[4] = {sin.x, sin.y, sin.z, sin.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float even = values[2 * i], odd = values[2 * i + 1];
        values[2 * i] = fmaf(even, c[i], -odd * s[i]);
        values[2 * i + 1] = fmaf(even, s[i], odd * c[i]);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, PROGRAMS) process_rows(
    const u16 *__restrict__ x,           // (B, L, C), strides (x_batch, x_row, 1)
    const u16 *__restrict__ branch,      // as x, or null
    const Parameter *__restrict__ gate,  // broadcast to (B, L, C), strides (gate_batch, gate_row, 1),
                                         // or null
    const Parameter *__restrict__ gain,  // as gate
    const Parameter *__restrict__ bias,  // as gate
    const float *__restrict__ cos,       // (L, 64), strides (table_row, 1), or null
    const float *__restrict__ sin,       // as cos
    u16 *__restrict__ stream,            // (B, L, C): x', or null
    void *__restrict__ y,                // (B, L, C)
    float *__restrict__ y_scale,         // (B·L, C / 128) with strides (1, B·L)
    float eps, int batches, int length,
    long long x_batch, long long x_row, long long branch_batch, long long branch_row,
    long long gate_batch, long long gate_row, long long gain_batch, long long gain_row,
    long long bias_batch, long long bias_row, long long table_row) {
    const int lane = threadIdx.x % (32 * TEAM);
    const int teams = (length + ROWS - 1) / ROWS;  // of a batch entry
    const int team = blockIdx.x * (WARPS / TEAM) + threadIdx.x / (32 * TEAM);
    if (team >= batches * teams) return;
    const int batch = team / teams, token = team % teams * ROWS;
    const int here = min(ROWS, length - token);  // rows of this team
    x += batch * x_batch + token * x_row;
    Chunk kept[ROWS][CHUNKS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const u16 *from = r < here ? x + r * x_row : x;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            kept[r][c] = *(const Chunk *)(from + STRIDE * c + 8 * lane);
    }
#if BRANCH
    branch += batch * branch_batch + token * branch_row + 8 * lane;
#if GATE
    gate += batch * gate_batch + token * gate_row + 8 * lane;
#endif
    stream += ((long long)batch * length + token) * CHANNELS + 8 * lane;
    Chunk added[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) added[c] = *(const Chunk *)(branch + STRIDE * c);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float values[8], addend[8];
        unpack(kept[0][c], values);
        unpack(added[c], addend);
#if GATE
        float factor[8];
        load_parameter(gate + STRIDE * c, factor);
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = fmaf(addend[i], factor[i], values[i]);
#else
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] += addend[i];
#endif
        kept[0][c] = pack(values);
        *(Chunk *)(stream + STRIDE * c) = kept[0][c];
    }
#endif
#if OUTPUT
    float rstd[ROWS], offset[ROWS];
    __shared__ Places places;
#if BRANCH
    measure(kept, stream, 0, eps, rstd, offset, places);
#else
    measure(kept, x + 8 * lane, here == ROWS ? x_row : 0, eps, rstd, offset, places);
#endif
    stay_packed(kept);
#if GAIN
    gain += batch * gain_batch + token * gain_row + 8 * lane;
#endif
#if BIAS
    bias += batch * bias_batch + token * bias_row + 8 * lane;
#endif
#if ROTATE
    cos += token * table_row + 4 * (lane % 16);
    sin += token * table_row + 4 * (lane % 16);
#endif
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float factor[8], shift[8] = {}, values[ROWS][8];
#if BIAS
        load_parameter(bias + STRIDE * c, shift);
#endif
#if GAIN
        load_parameter(gain + STRIDE * c, factor);
#pragma unroll
        for (int i = 0; i < 8; i++) factor[i] += OFFSET;
#endif
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            unpack(kept[r][c], values[r]);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                values[r][i] = fmaf(values[r][i], rstd[r], offset[r]);
                values[r][i] =
                    GAIN ? fmaf(values[r][i], factor[i], shift[i]) : values[r][i] + shift[i];
            }
#if ROTATE
            rotate(values[r], load_here(cos + (r < here ? r * table_row : 0)),
                   load_here(sin + (r < here ? r * table_row : 0)));
#endif
        }
        const long long row = (long long)batch * length + token;
        const long long at = row * CHANNELS + STRIDE * c + 8 * lane;
#if OUTPUT == 2
        u32 quantized[ROWS][2];
        const float step = quantize_rows(values, quantized, lane);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (r < here)
                *(uint2 *)((char *)y + at + r * CHANNELS) =
                    make_uint2(quantized[r][0], quantized[r][1]);
        const int r = lane / (16 / ROWS) % ROWS;
        if (lane % (16 / ROWS) == 0 && r < here)
            y_scale[(long long)(STRIDE / 128 * c + lane / 16) * batches * length + row + r] = step;
#else
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (r < here) *(Chunk *)((u16 *)y + at + r * CHANNELS) = pack(values[r]);
#endif
    }
#endif
}
