// What the kernels over rows share. A lane holds 8 consecutive channels of 16 bits: 16 bytes.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define DEVICE static __device__ __forceinline__

struct __align__(16) Chunk {
    u32 pairs[4];
};

DEVICE void unpack(const Chunk &chunk, float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = __uint_as_float(chunk.pairs[i] << 16);
        values[2 * i + 1] = __uint_as_float(chunk.pairs[i] & 0xFFFF0000u);
    }
}

DEVICE u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

DEVICE Chunk pack(const float (&values)[8]) {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; i++) chunk.pairs[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
    return chunk;
}

// The larger of each half, as integers without a sign: of two bf16, the larger magnitude.
DEVICE u32 max_of_halves(u32 a, u32 b) {
    u32 larger;
    asm("max.u16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}

// Starts copying 16 bytes to shared memory; zeros if they do not exist.
DEVICE void copy_chunk(u32 target, const void *source, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(exists ? 16 : 0)
                 : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The tanh form, x · sigmoid(√(8/π)·(x + 0.044715·x³)).
DEVICE float gelu(float x) {
    float power = x * fmaf(-0.1029432397f, x * x, -2.302208198f), e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(power));
    return x * reciprocal(1.0f + e);
}

#if __CUDA_ARCH__ >= 890
// Four floats as e4m3, the first in the lowest byte.
DEVICE u32 pack_e4m3(float a, float b, float c, float d) {
    u16 low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return (u32)low | ((u32)high << 16);
}

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int lanes = 16; lanes; lanes >>= 1) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

// The scale of a group of that largest magnitude, and what its values are multiplied by.
DEVICE float e4m3_step(float largest, float &factor) {
    largest = fmaxf(largest, 1e-8f);
    factor = reciprocal(largest) * 448.0f;
    return largest * (1.0f / 448.0f);
}

// Quantizes 128 channels that lie in 16 neighbouring lanes; returns their scale.
DEVICE float quantize_group(const float (&values)[8], u32 (&quantized)[2]) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(values[i]));
#pragma unroll
    for (int lanes = 8; lanes; lanes >>= 1)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    float factor;
    const float step = e4m3_step(largest, factor);
#pragma unroll
    for (int i = 0; i < 2; i++)
        quantized[i] = pack_e4m3(values[4 * i] * factor, values[4 * i + 1] * factor,
                                 values[4 * i + 2] * factor, values[4 * i + 3] * factor);
    return step;
}
#endif
