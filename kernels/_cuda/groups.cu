// Quantize bf16 values to e4m3 in groups of 128 along contiguous rows, after GELU if asked for.
//
// A lane takes 8 values, 16 lanes a group; every warp has LOADS chunks of each lane in flight.

constexpr int LOADS = 4;

extern "C" __global__ void __launch_bounds__(256) quantize_groups(
    const Chunk *x,  // (M, K) bf16, contiguous
    uint2 *q,        // (M, K) e4m3
    float *scale,    // (M, K / 128) with strides (1, M)
    int rows, int chunks_per_row) {
    const long long chunks = (long long)rows * chunks_per_row;
    const long long first = (long long)blockIdx.x * 256 * LOADS + threadIdx.x;
    Chunk loaded[LOADS];
#pragma unroll
    for (int n = 0; n < LOADS; n++)
        if (first + 256 * n < chunks) loaded[n] = x[first + 256 * n];
#pragma unroll
    for (int n = 0; n < LOADS; n++) {
        const long long at = first + 256 * n;
        float values[8];
        unpack(loaded[n], values);
#if GELU
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = gelu(values[i]);
#endif
        u32 quantized[2];
        const float step = quantize_group(values, quantized);
        if (at < chunks) {
            q[at] = make_uint2(quantized[0], quantized[1]);
            if (threadIdx.x % 16 == 0) {
                const int row = at / chunks_per_row, group = at % chunks_per_row / 16;
                scale[(long long)group * rows + row] = step;
            }
        }
    }
}
