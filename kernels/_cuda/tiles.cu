// Quantize bf16 values to int8 in blocks of 128×128, after GELU if asked for. A program takes a block,
// and its threads keep it in registers. PROGRAMS share a multiprocessor at least.

constexpr int CHUNKS = 128 * 16 / THREADS;  // of a thread, in the same column

#if GELU
// GELU's tanh form of two values with one reciprocal. Below −7 it is 0 to all digits that are kept.
DEVICE void gelu_of_two(float &x, float &y) {
    float e[2], reciprocal;
    x = fmaxf(x, -7.0f), y = fmaxf(y, -7.0f);
    const float powers[2] = {x * fmaf(-0.1029432397f, x * x, -2.302208198f),
                             y * fmaf(-0.1029432397f, y * y, -2.302208198f)};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e[i]) : "f"(powers[i]));
        e[i] += 1.0f;
    }
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(e[0] * e[1]));
    x *= e[1] * reciprocal, y *= e[0] * reciprocal;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) quantize_tiles(
    const u16 *__restrict__ x,  // (M, K), contiguous
    char *__restrict__ q,       // as x
    float *__restrict__ scale,  // (⌈M / 128⌉, K / 128)
    int rows, int groups) {
    __shared__ u32 largest_of_warps[THREADS / 32];
    const int row = blockIdx.x / groups * 128 + threadIdx.x / 16, here = rows - row;
    const long long columns = 128LL * groups, stride = THREADS / 16 * columns;
    const long long first = row * columns + blockIdx.x % groups * 128 + threadIdx.x % 16 * 8;
    x += first, q += first;
    Chunk loaded[CHUNKS] = {};  // zeros, where there is no row, change no maximum
#pragma unroll
    for (int n = 0; n < CHUNKS; n++, x += stride)
        if (THREADS / 16 * n < here) loaded[n] = *(const Chunk *)x;
#if GELU
    float values[CHUNKS][8], largest = 0.0f;
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) {
        unpack(loaded[n], values[n]);
#pragma unroll
        for (int i = 0; i < 8; i += 2) gelu_of_two(values[n][i], values[n][i + 1]);
        largest = largest_of(values[n], largest);
    }
    const u32 magnitude = __float_as_uint(largest);
#else
    u32 pair = 0;  // of magnitudes, which are ordered as their bits are
#pragma unroll
    for (int n = 0; n < CHUNKS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) pair = max_of_halves(pair, loaded[n].pairs[i] & 0x7FFF7FFFu);
    const u32 magnitude = max(pair << 16, pair & 0xFFFF0000u);
#endif
    largest_of_warps[threadIdx.x / 32] = __reduce_max_sync(0xffffffffu, magnitude);
    __syncthreads();
    u32 bits = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) bits = max(bits, largest_of_warps[w]);
    float scaling;
    const float step = int8_step(__uint_as_float(bits), scaling);
    if (threadIdx.x == 0) scale[blockIdx.x] = step;
#pragma unroll
    for (int n = 0; n < CHUNKS; n++, q += stride) {
        if (THREADS / 16 * n >= here) break;
#if GELU
        const uint2 packed = pack_int8(values[n], scaling);
#else
        // Of 8 digits like x, many quotients are halves. A rounded product is the half that it is near.
        float scaled[8];
        unpack(loaded[n], scaled);
#pragma unroll
        for (int i = 0; i < 8; i++) scaled[i] = __fmul_rn(scaled[i], scaling);
        const uint2 packed = pack_int8(scaled, 1.0f);
#endif
        *(uint2 *)q = packed;
    }
}
