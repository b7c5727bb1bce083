// Add a gated branch to a row, normalize it, modulate it and store it in bf16 or e4m3.
//
//     x' = x + branch · gate
//     y = (x' − mean) · rstd · (OFFSET + gain) + bias
//
// A team of TEAM warps takes a row and keeps it in registers. CHANNELS is a multiple of 256 · TEAM.
// BRANCH, GATE, GAIN and BIAS say which of them there are; without GAIN, OFFSET + gain is 1. OUTPUT:
// 0 none, 1 bf16, 2 e4m3 with a scale per 128 channels. PROGRAMS share a multiprocessor at least.
//
// Nothing that is read is written here; __restrict__ says so, or each load would wait for the store
// before it.

constexpr int STRIDE = 256 * TEAM, CHUNKS = CHANNELS / STRIDE;  // channels per step, steps

// The sum over a row's lanes; `places` are the program's, for this sum alone.
DEVICE float team_sum(float x, float (&places)[WARPS]) {
    x = warp_sum(x);
#if TEAM > 1
    const int warp = threadIdx.x >> 5;
    if ((threadIdx.x & 31) == 0) places[warp] = x;
    asm volatile("bar.sync %0, %1;" ::"r"(warp / TEAM + 1), "n"(32 * TEAM) : "memory");
    x = 0.0f;
#pragma unroll
    for (int i = 0; i < TEAM; i++) x += places[warp / TEAM * TEAM + i];
#endif
    return x;
}

// Where many programs are to share a multiprocessor, makes the compiler forget what it unpacked, so
// that only the packed row stays in registers.
DEVICE void stay_packed(Chunk (&kept)[CHUNKS]) {
#if PROGRAMS > 2
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+r"(kept[c].pairs[i]));
#endif
}

#if PARAMETER_BF16
typedef u16 Parameter;
DEVICE void load_parameter(const Parameter *at, float (&values)[8]) {
    unpack(*(const Chunk *)at, values);
}
#else
typedef float Parameter;
DEVICE void load_parameter(const Parameter *at, float (&values)[8]) {
    const float4 low = ((const float4 *)at)[0], high = ((const float4 *)at)[1];
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, PROGRAMS) process_rows(
    const u16 *__restrict__ x,           // (B, L, C), strides (x_batch, x_row, 1)
    const u16 *__restrict__ branch,      // as x, or null
    const Parameter *__restrict__ gate,  // broadcast to (B, L, C), strides (gate_batch, gate_row, 1),
                                         // or null
    const Parameter *__restrict__ gain,  // as gate
    const Parameter *__restrict__ bias,  // as gate
    u16 *__restrict__ stream,            // (B, L, C): x', or null
    void *__restrict__ y,                // (B, L, C)
    float *__restrict__ y_scale,         // (B·L, C / 128) with strides (1, B·L)
    float eps, int rows, int length,
    long long x_batch, long long x_row, long long branch_batch, long long branch_row,
    long long gate_batch, long long gate_row, long long gain_batch, long long gain_row,
    long long bias_batch, long long bias_row) {
    __shared__ float places[2][WARPS];
    const int lane = threadIdx.x % (32 * TEAM);
    const int row = blockIdx.x * (WARPS / TEAM) + threadIdx.x / (32 * TEAM);
    if (row >= rows) return;
    const int batch = row / length, token = row % length;
    x += batch * x_batch + token * x_row + 8 * lane;
    Chunk kept[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) kept[c] = *(const Chunk *)(x + STRIDE * c);
#if BRANCH
    branch += batch * branch_batch + token * branch_row + 8 * lane;
#if GATE
    gate += batch * gate_batch + token * gate_row + 8 * lane;
#endif
    stream += (long long)row * CHANNELS + 8 * lane;
    Chunk added[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) added[c] = *(const Chunk *)(branch + STRIDE * c);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float values[8], addend[8];
        unpack(kept[c], values);
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
        kept[c] = pack(values);
        *(Chunk *)(stream + STRIDE * c) = kept[c];
    }
#endif
#if OUTPUT
    float mean = 0.0f, squares = 0.0f;
#if CENTERED
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float values[8];
        unpack(kept[c], values);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += values[i];
    }
    mean = team_sum(sum, places[0]) * (1.0f / CHANNELS);
    stay_packed(kept);
#endif
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float values[8];
        unpack(kept[c], values);
#pragma unroll
        for (int i = 0; i < 8; i++) squares = fmaf(values[i] - mean, values[i] - mean, squares);
    }
    const float rstd = 1.0f / sqrtf(team_sum(squares, places[1]) * (1.0f / CHANNELS) + eps);
    const float offset = -mean * rstd;
    stay_packed(kept);
#if GAIN
    gain += batch * gain_batch + token * gain_row + 8 * lane;
#endif
#if BIAS
    bias += batch * bias_batch + token * bias_row + 8 * lane;
#endif
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float values[8], factor[8], shift[8] = {};
        unpack(kept[c], values);
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = fmaf(values[i], rstd, offset);
#if BIAS
        load_parameter(bias + STRIDE * c, shift);
#endif
#if GAIN
        load_parameter(gain + STRIDE * c, factor);
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = fmaf(values[i], OFFSET + factor[i], shift[i]);
#else
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] += shift[i];
#endif
        const long long at = (long long)row * CHANNELS + STRIDE * c + 8 * lane;
#if OUTPUT == 2
        u32 quantized[2];
        const float scale = quantize_group(values, quantized);
        *(uint2 *)((char *)y + at) = make_uint2(quantized[0], quantized[1]);
        if (lane % 16 == 0) y_scale[(long long)(STRIDE / 128 * c + lane / 16) * rows + row] = scale;
#else
        *(Chunk *)((u16 *)y + at) = pack(values);
#endif
    }
#endif
}
