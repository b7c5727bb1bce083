// Rounding to int8 with a scale for a block of 128×128.

constexpr float ROUNDING = 12582912.0f;  // 1.5·2²³: adding it leaves the integer in the low bits

// The scale of a block of that largest magnitude, and what its values are multiplied by: rounded to the
// nearest, as values of 8 digits often lie halfway between two steps, and fall to one side by it.
DEVICE float int8_step(float largest, float &factor) {
    largest = fmaxf(largest, 1e-8f);
    factor = 128.0f / largest;
    return largest * (1.0f / 128.0f);
}

// The smaller of each half, as signed integers.
DEVICE u32 min_of_halves(u32 a, u32 b) {
    u32 smaller;
    asm("min.s16x2 %0, %1, %2;" : "=r"(smaller) : "r"(a), "r"(b));
    return smaller;
}

// round_half_even(value · factor) of four values, the first in the lowest byte; 128 becomes 127.
DEVICE u32 pack_four(const float *values, float factor) {
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; i++) bits[i] = __float_as_uint(fmaf(values[i], factor, ROUNDING));
    const u32 low = min_of_halves(__byte_perm(bits[0], bits[1], 0x5410), 0x007F007Fu);
    const u32 high = min_of_halves(__byte_perm(bits[2], bits[3], 0x5410), 0x007F007Fu);
    return __byte_perm(low, high, 0x6420);
}

// Eight values, in order.
DEVICE uint2 pack_int8(const float (&values)[8], float factor) {
    return make_uint2(pack_four(values, factor), pack_four(values + 4, factor));
}

DEVICE float largest_of(const float (&values)[8], float largest) {
#pragma unroll
    for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(values[i]));
    return largest;
}

// The largest over 16 neighbouring lanes.
DEVICE float largest_of_lanes(float x) {
#pragma unroll
    for (int lanes = 8; lanes; lanes >>= 1)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
}
