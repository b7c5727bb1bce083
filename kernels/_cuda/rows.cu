// Add a gated branch to a row, normalize it, modulate it and store it in bf16 or e4m3.
//
//     x' = x + branch · gate
//     y = (x' − mean) · rstd · (OFFSET + gain) + bias
//
// A team of TEAM warps, one or two, takes a row and keeps it packed in registers. CHANNELS is a
// multiple of 256 · TEAM. OUTPUT: 0 none, 1 bf16, 2 e4m3 with a scale per 128 channels.

constexpr int STRIDE = 256 * TEAM, CHUNKS = CHANNELS / STRIDE;  // channels per step, steps

// The sum over a row's lanes; `place` is a slot of the team's own.
DEVICE float team_sum(float x, float *place) {
    x = warp_sum(x);
#if TEAM > 1
    const int warp = threadIdx.x >> 5;
    if ((threadIdx.x & 31) == 0) place[warp] = x;
    asm volatile("bar.sync %0, %1;" ::"r"(warp / TEAM + 1), "n"(32 * TEAM) : "memory");
    x = place[warp] + place[warp ^ 1];
#endif
    return x;
}

// Makes the compiler forget what it unpacked, so that only the packed row stays in registers.
DEVICE void keep_packed(Chunk (&kept)[CHUNKS]) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+r"(kept[c].pairs[i]));
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

extern "C" __global__ void __launch_bounds__(WARPS * 32) process_rows(
    const u16 *x,           // (B, L, C), strides (x_batch, x_row, 1)
    const u16 *branch,      // as x, or null
    const Parameter *gate,  // broadcast to (B, L, C), strides (gate_batch, gate_row, 1), or null
    const Parameter *gain,  // as gate
    const Parameter *bias,  // as gate
    u16 *stream,            // (B, L, C): x', or null
    void *y,                // (B, L, C)
    float *y_scale,         // (B·L, C / 128) with strides (1, B·L)
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
    float sum = 0.0f;
#if BRANCH
    branch += batch * branch_batch + token * branch_row + 8 * lane;
    if (gate) gate += batch * gate_batch + token * gate_row + 8 * lane;
    stream += (long long)row * CHANNELS + 8 * lane;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float values[8], added[8];
        unpack(*(const Chunk *)(branch + STRIDE * c), added);
        unpack(kept[c], values);
        if (gate) {
            float factor[8];
            load_parameter(gate + STRIDE * c, factor);
#pragma unroll
            for (int i = 0; i < 8; i++) added[i] *= factor[i];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] += added[i];
        kept[c] = pack(values);
        *(Chunk *)(stream + STRIDE * c) = kept[c];
    }
#endif
#if OUTPUT
    keep_packed(kept);
    float mean = 0.0f;
#if CENTERED
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float values[8];
        unpack(kept[c], values);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += values[i];
    }
    mean = team_sum(sum, places[0]) / CHANNELS;
    keep_packed(kept);
#endif
    float squares = 0.0f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float values[8];
        unpack(kept[c], values);
#pragma unroll
        for (int i = 0; i < 8; i++) squares = fmaf(values[i] - mean, values[i] - mean, squares);
    }
    const float rstd = 1.0f / sqrtf(team_sum(squares, places[1]) / CHANNELS + eps);
    keep_packed(kept);
    if (gain) gain += batch * gain_batch + token * gain_row + 8 * lane;
    if (bias) bias += batch * bias_batch + token * bias_row + 8 * lane;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float values[8], other[8];
        unpack(kept[c], values);
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = (values[i] - mean) * rstd;
        if (gain) {
            load_parameter(gain + STRIDE * c, other);
#pragma unroll
            for (int i = 0; i < 8; i++) values[i] *= OFFSET + other[i];
        }
        if (bias) {
            load_parameter(bias + STRIDE * c, other);
#pragma unroll
            for (int i = 0; i < 8; i++) values[i] += other[i];
        }
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
