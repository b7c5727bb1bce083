// Values as 16-bit floats, two in a register, eight in a chunk: 11 digits.

DEVICE u32 pack_halves(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

DEVICE float first_half(u32 halves) {
    float x;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}"
        : "=f"(x)
        : "r"(halves));
    return x;
}

DEVICE u32 fma_of_halves(u32 a, u32 b, u32 c) {
    u32 sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

// The larger magnitude of each half, with a sign that means nothing. A NaN is passed over.
DEVICE u32 larger_of_halves(u32 a, u32 b) {
    u32 larger;
    asm("max.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}

DEVICE Chunk pack_halves(const float (&values)[8]) {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; i++) chunk.pairs[i] = pack_halves(values[2 * i], values[2 * i + 1]);
    return chunk;
}

DEVICE Chunk fma_of_halves(const Chunk &a, const Chunk &b, const Chunk &c) {
    Chunk sum;
#pragma unroll
    for (int i = 0; i < 4; i++) sum.pairs[i] = fma_of_halves(a.pairs[i], b.pairs[i], c.pairs[i]);
    return sum;
}

DEVICE Chunk larger_of_halves(const Chunk &a, const Chunk &b) {
    Chunk larger;
#pragma unroll
    for (int i = 0; i < 4; i++) larger.pairs[i] = larger_of_halves(a.pairs[i], b.pairs[i]);
    return larger;
}

DEVICE float largest_half(const Chunk &chunk) {
    const u32 all = larger_of_halves(larger_of_halves(chunk.pairs[0], chunk.pairs[1]),
                                     larger_of_halves(chunk.pairs[2], chunk.pairs[3]));
    return fmaxf(fabsf(first_half(all)), fabsf(first_half(all >> 16)));
}

// Takes a power of two out of factor and shift of 128 channels, so that factor · x + shift is below 2¹⁵
// where |x| ≤ √CHANNELS, as of normalized rows; returns it. 2⁴⁰ is enough for what counts, above 1e-8.
DEVICE float shrink(float (&factor)[8], float (&shift)[8]) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++)
        most = fmaxf(most, fmaf(fabsf(factor[i]), sqrtf(CHANNELS), fabsf(shift[i])));
    const int exponent = __float_as_uint(largest_of_lanes(most)) >> 23;
    const float down = __uint_as_float((u32)min(268 - exponent, 127 + 40) << 23);
#pragma unroll
    for (int i = 0; i < 8; i++) factor[i] *= down, shift[i] *= down;
    return down;
}

// int8_step of values that are `down` times too large. The factor is a half, twice: the step is that
// of the half. 2¹⁵ is the most it can be.
DEVICE float int8_step(float largest, float down, u32 &factor) {
    const float most = fminf(32768.0f, 128.0f / 1e-8f / down), wanted = fminf(128.0f / largest, most);
    factor = pack_halves(wanted, wanted);
    return 1.0f / (first_half(factor) * down);
}

// round_half_even(value · factor), the first in the lowest byte; 128 becomes 127.
DEVICE uint2 pack_int8(const Chunk &values, u32 factor) {
    constexpr u32 rounding = 0x66006600u;  // 1.5·2¹⁰, twice: adding it leaves integers in the low bits
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        bits[i] = min_of_halves(fma_of_halves(values.pairs[i], factor, rounding), 0x667F667Fu);
    return make_uint2(__byte_perm(bits[0], bits[1], 0x6420), __byte_perm(bits[2], bits[3], 0x6420));
}
