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
constexpr float UNIT = MAP == 0 ? LOG2_E : 1.0f;  // of k and q in registers: softmax takes 2 to them
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

// Cosines and sines of 4 pairs, times `factor`.
//
// A word of `turns` is a pair's cosine in the lower half and its sine in the upper, both rounded to
// 16384 + 16383·x with the highest bit set, as measure_rms.cu packs them. With 0x3F above and zeros
// below, a half is a float F in 1 … 2, of which x is F · 32768 / 16383 − 49152 / 16383.
DEVICE void unpack_angles(float2 (&angles)[4], const Chunk &turns, float factor) {
    const float scale = factor * (32768.0f / 16383.0f), offset = factor * (-49152.0f / 16383.0f);
#pragma unroll
    for (int p = 0; p < 4; p++) {
        const u32 word = turns.pairs[p];
        angles[p].x = fmaf(__uint_as_float(__byte_perm(word, 0x3F000000u, 0x7104)), scale, offset);
        angles[p].y = fmaf(__uint_as_float(__byte_perm(word, 0x3F000000u, 0x7324)), scale, offset);
    }
}

// The rotation of 4 pairs times their weights, less `mean`.
DEVICE void turn(float (&x)[8], const float2 (&angles)[4], const float (&weight)[8],
                 const float *mean = nullptr) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
        const float even = x[2 * p] * weight[2 * p], odd = x[2 * p + 1] * weight[2 * p + 1];
        const float cos = angles[p].x, sin = angles[p].y;
        x[2 * p] = fmaf(even, cos, mean ? fmaf(-odd, sin, -mean[2 * p]) : -odd * sin);
        x[2 * p + 1] = fmaf(even, sin, mean ? fmaf(odd, cos, -mean[2 * p + 1]) : odd * cos);
    }
}

DEVICE void copy_word(u32 target, const void *source, bool exists) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source),
                 "r"(exists ? 4 : 0)
                 : "memory");
}

// Where 4 tokens of a warp arrive, 8 lanes a token: of lane 8t + `piece`, chunks `piece` and `piece` + 8
// of k or q, and as many of the tables. A lane reads what it has copied itself, but for the norms of
// the warp's 16 tokens of a block, copied by a lane each: many copies of one word take a cycle each.
constexpr u32 ROWS_BYTES = 2 * 512, TURNS_BYTES = ROTATION * 2 * 512, NORMS_BYTES = 64;
constexpr u32 RING_ALIGNMENT = 2 * NORMS_BYTES;  // of two blocks, so that ^ NORMS_BYTES changes them

// Zeros if the token does not exist.
DEVICE void copy_row(u32 target, int lane, const u16 *x, bool exists) {
    copy_chunk(target + 16 * lane, x, exists);
    copy_chunk(target + 16 * lane + 512, x + 64, exists);
}

DEVICE void copy_turns(u32 target, int lane, const u32 *turns, bool exists) {
#if ROTATION
    copy_chunk(target + 16 * lane, turns, exists);
    copy_chunk(target + 16 * lane + 512, turns + 32, exists);
#endif
}

// Cosines and sines of the lane's pairs in one half of the channels, times `rstd`: zeros, as tables are
// of finite numbers, if the token does not exist.
DEVICE void read_angles(float2 (&angles)[4], u32 turns, float rstd, int lane, int half) {
#if ROTATION
    unpack_angles(angles, load_shared(turns + 16 * lane + 512 * half), rstd);
#endif
}

// The lane's channels in one half times UNIT, less `mean`: rotated by weights that have UNIT, if they
// are to be rotated.
DEVICE void read_row(float (&x)[8], u32 rows, int lane, const float2 (&angles)[4],
                     const float (&weight)[8], int half, const float *mean = nullptr) {
    unpack(load_shared(rows + 16 * lane + 512 * half), x);
#if ROTATION
    turn(x, angles, weight, mean);
#else
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = fmaf(x[i], UNIT, mean ? -mean[i] : 0.0f);
#endif
}

// RMSNorm's weights of a lane's channels, times UNIT.
DEVICE void load_weights(const Weight *at, float (&values)[2][8]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        load_weight(at + 64 * half, values[half]);
#pragma unroll
        for (int i = 0; i < 8; i++) values[half][i] *= UNIT;
    }
}

// Of a lane's channels.
DEVICE float largest_magnitude(const float (&x)[2][8]) {
    float largest[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        largest[half] = fmaxf(fabsf(x[half][0]), fabsf(x[half][1]));
#pragma unroll
        for (int i = 2; i < 8; i++) largest[half] = fmaxf(largest[half], fabsf(x[half][i]));
    }
    return fmaxf(largest[0], largest[1]);
}

// Over the 8 lanes of a token.
DEVICE float token_max(float x) {
#pragma unroll
    for (int lanes = 4; lanes; lanes >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
    return x;
}

DEVICE float token_sum(float x) {
#pragma unroll
    for (int lanes = 4; lanes; lanes >>= 1) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    return x;
}

// φ of a channel times UNIT, before softmax's division.
DEVICE float feature(float x) {
#if MAP == 0
    return exp2_fast(x);
#elif MAP == 1
    return x > 0.0f ? x + 1.0f : exp2_fast(x * LOG2_E);
#else
    return fmaxf(x, 0.0f);
#endif
}

// Channels beyond this, of either sign, make powers of two so large that their products may overflow, or
// all of a token's so small that their sum is zero.
constexpr float LARGE = 40.0f;

// Of a lane's channels, with its sign.
DEVICE float largest_channel(const float (&x)[2][8]) {
    float largest = x[0][0];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 8; i++) largest = fmaxf(largest, x[half][i]);
    return largest;
}

// Softmax does not change if a token's largest channel is subtracted from all: done for a whole warp
// where some of its channels are large, or of its block's may be.
DEVICE void subtract_largest(float (&x)[2][8]) {
    const float largest = token_max(largest_channel(x));
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 8; i++) x[half][i] -= largest;
}

// round_half_even(x · factor) of 4 values, which lie in −127 … 127.
DEVICE u32 to_int8(const float *x, float factor) {
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; i++) bits[i] = __float_as_uint(fmaf(x[i], factor, ROUNDING));
    return __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040),
                       0x5410);
}
