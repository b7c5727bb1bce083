// Gain, bias and gate of 8 channels: bf16 where PARAMETER_BF16 is set, else float32.

// Of several rows, a load that stays in its place: brought forward, it would take the rows' registers.
DEVICE float4 load_here(const float *at) {
#if ROWS > 1
    float4 x;
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(at)
                 : "memory");
    return x;
#else
    return *(const float4 *)at;
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
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const float4 x = load_here(at + i);
        values[i] = x.x, values[i + 1] = x.y, values[i + 2] = x.z, values[i + 3] = x.w;
    }
}
#endif
