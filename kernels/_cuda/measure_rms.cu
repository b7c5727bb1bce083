// 1 / sqrt(mean square over all heads + eps) of each token of q and of k, and the rotation's tables as
// tokens.cuh reads them. A warp takes a row.

constexpr int WARPS = 8, CHUNKS = CHANNELS / 8, LOADS = 6;  // LOADS: of a lane in flight

// −1 … 1 as 1 … 32767, and the highest bit of 16.
DEVICE u32 fixed_point(float x) {
    return 0x8000u | (u32)__float2int_rn(fmaf(fminf(fmaxf(x, -1.0f), 1.0f), 16383.0f, 16384.0f));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) measure_rms(
    const u16 *q,  // (B, L, CHANNELS) bf16, strides (q_batch, q_token, 1)
    const u16 *k,  // as q
    const float2 *cos,  // (L, 64)
    const float2 *sin,
    float *rstd,   // (2, B, L): of q, of k
    uint2 *turns,  // (L, 64) of 32 bits
    float eps, int batches, int length,
    long long q_batch, long long q_token, long long k_batch, long long k_token) {
    const int lane = threadIdx.x & 31, rows = batches * length;
    const int row = blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (row >= 2 * rows) return;
    const bool of_k = row >= rows;
    const int token = (of_k ? row - rows : row) % length, batch = (of_k ? row - rows : row) / length;
    if (row < length) {
        const float2 c = cos[row * 32 + lane], s = sin[row * 32 + lane];
        turns[row * 32 + lane] = make_uint2(fixed_point(c.x) | fixed_point(s.x) << 16,
                                            fixed_point(c.y) | fixed_point(s.y) << 16);
    }
    const Chunk *x = (const Chunk *)(of_k ? k + batch * k_batch + token * k_token
                                          : q + batch * q_batch + token * q_token);
    float squares[8] = {};
#pragma unroll 1
    for (int first = lane; first < CHUNKS; first += 32 * LOADS) {
        Chunk loaded[LOADS];
#pragma unroll
        for (int n = 0; n < LOADS; n++)
            loaded[n] = first + 32 * n < CHUNKS ? x[first + 32 * n] : Chunk{};
#pragma unroll
        for (int n = 0; n < LOADS; n++) {
            float values[8];
            unpack(loaded[n], values);
#pragma unroll
            for (int i = 0; i < 8; i++) squares[i] = fmaf(values[i], values[i], squares[i]);
        }
    }
    const float sum = warp_sum(((squares[0] + squares[1]) + (squares[2] + squares[3])) +
                               ((squares[4] + squares[5]) + (squares[6] + squares[7])));
    if (lane == 0) rstd[row] = 1.0f / sqrtf(sum / CHANNELS + eps);
}
