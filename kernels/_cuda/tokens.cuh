// What the kernels share that prepare q, k and v of sparse-linear attention.
//
// A head's token is 128 channels of bf16, 16 chunks of 16 bytes. Macros that a caller sets:
// ROTATION: 1 if q and k are still to be normalized and rotated. WEIGHT: RMSNorm's, 0 none,
// 1 float32, 2 bf16. MAP: the feature map φ, 0 softmax over channels, 1 elu + 1, 2 relu.
//
// In int8 tiles chunk c of a token holds channels 8c … 8c + 7, then 64 + 8c … 64 + 8c + 7, for q as
// for k: a thread that holds whole 16-byte chunks of bf16 then stores whole chunks of int8.

constexpr int HEAD_DIM = 128, PAIRS = 64;
constexpr u32 ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float ROUNDING = 12582912.0f;  // 1.5·2²³: adding it leaves the integer in the low bits

// Where a row of 128 bytes keeps its 16-byte chunk, in sm90's swizzle of that width.
DEVICE u32 swizzled(u32 row, u32 chunk) {
    return row * 128 + ((chunk ^ (row & 7)) << 4);
}

DEVICE Chunk load_shared(u32 address) {
    Chunk c;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(c.pairs[0]), "=r"(c.pairs[1]), "=r"(c.pairs[2]), "=r"(c.pairs[3])
                 : "r"(address)
                 : "memory");
    return c;
}

DEVICE void store_shared(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

DEVICE void store_shared(u32 address, const Chunk &c) {
    store_shared(address, c.pairs[0], c.pairs[1], c.pairs[2], c.pairs[3]);
}

DEVICE void store_shared(u32 address, u32 word) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

DEVICE float load_shared_float(u32 address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

// Eight floats.
DEVICE void load_shared(u32 address, float (&values)[8]) {
    const Chunk low = load_shared(address), high = load_shared(address + 16);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[i] = __uint_as_float(low.pairs[i]);
        values[4 + i] = __uint_as_float(high.pairs[i]);
    }
}

#if WEIGHT == 2
typedef u16 Weight;
#else
typedef float Weight;
#endif

DEVICE void load_floats(const float *at, float (&values)[8]) {
    const float4 low = ((const float4 *)at)[0], high = ((const float4 *)at)[1];
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

// RMSNorm's weights of 8 channels; ones where there are none.
DEVICE void load_weight(const Weight *at, float (&values)[8]) {
#if WEIGHT == 2
    unpack(*(const Chunk *)at, values);
#elif WEIGHT == 1
    load_floats(at, values);
#else
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = 1.0f;
#endif
}

// RMSNorm of 8 channels, then the rotation of their 4 pairs by the token's angles.
DEVICE void normalize_and_turn(float (&x)[8], float rstd, const float (&weight)[8], float4 cos,
                               float4 sin) {
    const float c[4] = {cos.x, cos.y, cos.z, cos.w}, s[4] = {sin.x, sin.y, sin.z, sin.w};
#pragma unroll
    for (int p = 0; p < 4; p++) {
        const float even = x[2 * p] * weight[2 * p], odd = x[2 * p + 1] * weight[2 * p + 1];
        const float own = c[p] * rstd, other = s[p] * rstd;
        x[2 * p] = fmaf(even, own, -odd * other);
        x[2 * p + 1] = fmaf(even, other, odd * own);
    }
}

// φ before softmax's division; `largest` is the row's, which only softmax reads.
DEVICE float feature(float x, float largest) {
#if MAP == 0
    return exp2_fast((x - largest) * LOG2_E);
#elif MAP == 1
    return x > 0.0f ? x + 1.0f : exp2_fast(x * LOG2_E);
#else
    return fmaxf(x, 0.0f);
#endif
}

// round_half_even((x − mean) · factor) of 4 values, which lie in −127 … 127.
DEVICE u32 to_int8(const float *x, const float *mean, float factor) {
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        bits[i] = __float_as_uint(fmaf(mean ? x[i] - mean[i] : x[i], factor, ROUNDING));
    return __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040),
                       0x5410);
}
