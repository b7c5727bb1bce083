// Of each block of 128 tokens and each channel: the mean, least and largest key, v's amax.
//
// A warp takes a block of one head, two tokens at a time: 16 lanes of 8 channels are a token. The
// warps of a program take different heads of the same tokens, so that they share the tables in the
// first-level cache. Each warp's next tokens are on their way into its own part of shared memory.

constexpr int BLOCK = 128, WARPS = 4, STAGES = 3, TOKENS = 4;  // TOKENS of a stage

DEVICE void store_floats(float *at, const float (&values)[8]) {
    ((float4 *)at)[0] = make_float4(values[0], values[1], values[2], values[3]);
    ((float4 *)at)[1] = make_float4(values[4], values[5], values[6], values[7]);
}

DEVICE Chunk load_table(const u32 *at) {
    const uint4 words = __ldg((const uint4 *)at);
    return {words.x, words.y, words.z, words.w};
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 6) measure_keys(
    const u16 *k,          // head h of token t of batch b at b·k_batch + t·k_token + h·k_head
    const u16 *v,          // as k
    const float *rstd,     // (B, L)
    const Weight *weight,  // (H·128,), or null
    const u32 *turns,      // (L, 64) of measure_rms.cu, or null: k is used as it is
    float *k_means,   // (B·H, NK, 128)
    float *k_bounds,  // (2, B·H, NK, 128): least and largest
    float *v_amax,    // (B·H, NK, 128)
    int length, int heads, int all_heads, long long k_batch, long long k_token, long long k_head,
    long long v_batch, long long v_token, long long v_head) {
    __shared__ Chunk ring[WARPS][STAGES][TOKENS][32];  // a lane reads what it has copied itself
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int head_of_all = blockIdx.x * WARPS + warp, block = blockIdx.y, blocks = gridDim.y;
    if (head_of_all >= all_heads) return;
    const int batch = head_of_all / heads, head = head_of_all % heads;
    const int odd_token = lane >> 4, channel = 8 * (lane & 15);
    const int first = block * BLOCK, count = min(BLOCK, length - first);
    k += batch * k_batch + head * k_head + first * k_token + channel;
    v += batch * v_batch + head * v_head + first * v_token + channel;
    const u32 own = shared_address(&ring[warp][0][0][lane]);
    auto request = [&](int stage) {
        const u32 target = own + stage % STAGES * (TOKENS * 512);
#pragma unroll
        for (int n = 0; n < TOKENS / 2; n++) {
            const int token = TOKENS * stage + 2 * n + odd_token;
            const long long at = token < count ? token : 0;
            copy_chunk(target + 1024 * n, k + at * k_token, token < count);
            copy_chunk(target + 1024 * n + 512, v + at * v_token, token < count);
        }
        commit_copies();
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) request(stage);

    float weights[8];
    load_weight(weight + head * HEAD_DIM + channel, weights);
    rstd += (long long)batch * length + first;
    turns += (long long)first * PAIRS + channel / 2;
    float sum[8], least[8], most[8];
    u32 v_most[4] = {};
#pragma unroll
    for (int i = 0; i < 8; i++)
        sum[i] = 0.0f, most[i] = -__int_as_float(0x7F800000), least[i] = -most[i];
#pragma unroll 1
    for (int stage = 0; TOKENS * stage < count; stage++) {
        wait_copies<STAGES - 2>();
        const u32 source = own + stage % STAGES * (TOKENS * 512);
#pragma unroll
        for (int n = 0; n < TOKENS / 2; n++) {
            const int token = TOKENS * stage + 2 * n + odd_token;
            const Chunk values = load_shared(source + 1024 * n + 512);
#pragma unroll
            for (int i = 0; i < 4; i++)
                v_most[i] = max_of_halves(v_most[i], values.pairs[i] & 0x7FFF7FFFu);
            if (token >= count) continue;
            float x[8];
            unpack(load_shared(source + 1024 * n), x);
#if ROTATION
            float2 angles[4];
            unpack_angles(angles, load_table(turns + token * PAIRS), rstd[token]);
            turn(x, angles, weights);
#endif
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sum[i] += x[i];
                least[i] = fminf(least[i], x[i]);
                most[i] = fmaxf(most[i], x[i]);
            }
        }
        request(stage + STAGES - 1);
    }
    wait_copies<0>();

    float amax[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v_most[i] = max_of_halves(v_most[i], __shfl_xor_sync(ALL_LANES, v_most[i], 16));
        amax[2 * i] = __uint_as_float(v_most[i] << 16);
        amax[2 * i + 1] = __uint_as_float(v_most[i] & 0xFFFF0000u);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        sum[i] = (sum[i] + __shfl_xor_sync(ALL_LANES, sum[i], 16)) / count;
        least[i] = fminf(least[i], __shfl_xor_sync(ALL_LANES, least[i], 16));
        most[i] = fmaxf(most[i], __shfl_xor_sync(ALL_LANES, most[i], 16));
    }
    const long long place = ((long long)head_of_all * blocks + block) * HEAD_DIM + channel;
    if (odd_token) {
        store_floats(k_bounds + place, least);
        store_floats(k_bounds + (long long)all_heads * blocks * HEAD_DIM + place, most);
    } else {
        store_floats(k_means + place, sum);
        store_floats(v_amax + place, amax);
    }
}
