// int8 tiles of smoothed keys, e4m3 tiles of values, and the state of the linear branch, φ(k)ᵀv and
// Σφ(k), for Hopper (sm_90a). Tiles lie as sparse_attention.cu wants them.
//
// A program takes `per_part` consecutive blocks of one head, 64 tokens at a time. They arrive in
// shared memory in the layout of the tensor cores' operands, channels along rows of 128 bytes
// (swizzled): k's and v's lower and upper 64 channels. A thread reads the two chunks of k that it has
// copied itself, 8 lanes a token, and puts φ(k) in their place; v is multiplied as it is. Four
// warpgroups hold a quarter of the state each, and multiply while they prepare the next tokens.
// Σφ(k) is a product with ones, so that it sums the φ(k) that φ(k)ᵀv sums, rounded to bf16.

constexpr int BLOCK = 128, THREADS = 512, TOKENS = 64, STAGES = 4;
constexpr u32 PART_BYTES = TOKENS * 128, STAGE_BYTES = 4 * PART_BYTES, TILE_BYTES = BLOCK * HEAD_DIM;
constexpr u32 ONES_BYTES = 512;

// Four 8×8 matrices of bf16, transposed: lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_transposed(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

DEVICE void store_tile(void *target, u32 source) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target),
                 "r"(source), "n"(TILE_BYTES)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

DEVICE void wait_for_tile_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
DEVICE void wait_for_tile_store() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// d (64×64) = a (64×16) · b (16×64) + d, or without d; both bf16 in shared memory, tokens as rows
DEVICE void multiply(float (&d)[32], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
        "%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, add, 1, 1, 1, 1;\n}\n"
        : R8("+f", 0), R8("+f", 8), R8("+f", 16), R8("+f", 24)
        : "l"(a), "l"(b), "r"(add));
}

// d (64×8) = a (64×16, as above) · ones (16×8, in any order) + d, or without d
DEVICE void add_tokens(float (&d)[4], u64 a, u32 ones, int add) {
    const u64 b = (u64)((ones & 0x3FFFF) >> 4) | ((u64)(128 >> 4) << 16) | ((u64)(128 >> 4) << 32);
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %6, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, "
                 "add, 1, 1, 1, 0;\n}\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "l"(a), "l"(b), "r"(add));
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

// φ of a token's 16 channels in this lane; 0 if the token does not exist.
DEVICE void take_features(float (&x)[2][8], bool exists) {
    float factor = exists ? 1.0f : 0.0f, largest = 0.0f;
#if MAP == 0
    largest = fmaxf(x[0][0], x[1][0]);
#pragma unroll
    for (int i = 1; i < 8; i++) largest = fmaxf(largest, fmaxf(x[0][i], x[1][i]));
    largest = token_max(largest);
    float sums[2] = {};
#endif
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x[half][i] = feature(x[half][i], largest);
#if MAP == 0
            sums[half] += x[half][i];
#endif
        }
#if MAP == 0
    factor = __fdividef(factor, token_sum(sums[0] + sums[1]));
#endif
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 8; i++) x[half][i] *= factor;
}

struct Token {  // what a thread will need of the token it prepares next
    float4 cos[2], sin[2];
    float rstd, factor;  // factor: 1 / k_scale
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) prepare_keys(
    const u16 *k,          // head h of token t of batch b at b·k_batch + t·k_token + h·k_head
    const u16 *v,          // as k
    const float *rstd,     // (B, L)
    const Weight *weight,  // (H·128,), or null
    const float *cos,      // (L, 64), or null: k is used as it is
    const float *sin,
    const float *k_mean,   // (B·H, 128)
    const float *k_scale,  // (B·H, NK)
    const float *v_scale,  // (B·H, 128)
    u8 *k_int8,            // (B·H, NK, 128, 128): token, channels as tokens.cuh orders them
    u8 *v_fp8,             // (B·H, NK, 128, 128) e4m3: channel, token
    float *state,          // (B·H, parts, 128, 128): φ(k)'s channel, v's; not if LINEAR is 0
    float *key_sum,        // (B·H, parts, 128)
    int length, int heads, int blocks, int per_part,
    long long k_batch, long long k_token, long long k_head,
    long long v_batch, long long v_token, long long v_head) {
    extern __shared__ u8 memory[];
    const u32 ring = (shared_address(memory) + 1023) & ~1023u;
    const u32 v_tile = ring + STAGES * STAGE_BYTES, ones = v_tile + TILE_BYTES;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int head_of_all = blockIdx.y, batch = head_of_all / heads, head = head_of_all % heads;
    const int first_block = blockIdx.x * per_part;
    const int stages = 2 * (min(first_block + per_part, blocks) - first_block);
    const int row = thread >> 3, piece = thread & 7;  // channels 8·piece … and 64 + 8·piece …
    const u32 own = swizzled(row, piece);
    const int first = first_block * BLOCK + row;  // this thread's token of stage 0
    k += batch * k_batch + head * k_head + 8 * piece;
    v += batch * v_batch + head * v_head + 8 * piece;

    auto request = [&](int stage) {
        if (stage < stages) {
            const int token = first + TOKENS * stage;
            const bool exists = token < length;
            const u32 target = ring + stage % STAGES * STAGE_BYTES + own;
            const u16 *key = k + (exists ? token * k_token : 0);
            const u16 *value = v + (exists ? token * v_token : 0);
            copy_chunk(target, key, exists);
            copy_chunk(target + PART_BYTES, key + 64, exists);
            copy_chunk(target + 2 * PART_BYTES, value, exists);
            copy_chunk(target + 3 * PART_BYTES, value + 64, exists);
        }
        commit_copies();
    };
    request(0);
    request(1);

    rstd += (long long)batch * length;
    cos += 4 * piece, sin += 4 * piece;
    k_scale += (long long)head_of_all * blocks + first_block;
    auto look_up = [&](Token &ahead, int stage) {
        const int token = first + TOKENS * stage;
        ahead.rstd = 0.0f;
        if (stage >= stages) return;
        ahead.factor = __fdividef(1.0f, __ldg(k_scale + stage / 2));
#if ROTATION
        if (token >= length) return;
        ahead.rstd = __ldg(rstd + token);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const long long at = (long long)token * PAIRS + 32 * half;
            ahead.cos[half] = __ldg((const float4 *)(cos + at));
            ahead.sin[half] = __ldg((const float4 *)(sin + at));
        }
#endif
    };
    Token ahead = {};
    look_up(ahead, 0);

    float weights[2][8], mean[2][8];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        load_weight(weight + head * HEAD_DIM + 64 * half + 8 * piece, weights[half]);
        load_floats(k_mean + head_of_all * HEAD_DIM + 64 * half + 8 * piece, mean[half]);
    }
    const int v_channel = 8 * warp + (lane >> 2);  // of this thread's part of the transposed tile
    const float v_factor = 1.0f / v_scale[head_of_all * HEAD_DIM + v_channel];
    const long long tile = ((long long)head_of_all * blocks + first_block) * TILE_BYTES;
    k_int8 += tile + own;
    v_fp8 += tile;
#if LINEAR
    if (thread < ONES_BYTES / 16)
        store_shared(ones + 16 * thread, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u);
    const int group = warp >> 2, lower = group & 1, right = group >> 1;  // quarter of the state
    float products[32], sums[4];  // set by the first product
#endif

#pragma unroll 1
    for (int stage = 0; stage < stages; stage++) {
        const u32 keys = ring + stage % STAGES * STAGE_BYTES, values = keys + 2 * PART_BYTES;
        wait_copies<1>();
        if (thread == 0) wait_for_tile_read();
        __syncthreads();
        request(stage + 2);

        float x[2][8];
        unpack(load_shared(keys + own), x[0]);
        unpack(load_shared(keys + PART_BYTES + own), x[1]);
        const bool exists = first + TOKENS * stage < length;
        const float factor = exists ? ahead.factor : 0.0f;
#if ROTATION
#pragma unroll
        for (int half = 0; half < 2; half++)
            normalize_and_turn(x[half], ahead.rstd, weights[half], ahead.cos[half],
                               ahead.sin[half]);
#endif
        look_up(ahead, stage + 1);
        uint4 rounded;
        rounded.x = to_int8(x[0], mean[0], factor), rounded.y = to_int8(x[0] + 4, mean[0] + 4, factor);
        rounded.z = to_int8(x[1], mean[1], factor), rounded.w = to_int8(x[1] + 4, mean[1] + 4, factor);
        *(uint4 *)(k_int8 + (long long)stage * PART_BYTES) = rounded;
#if LINEAR
        take_features(x, exists);
        store_shared(keys + own, pack(x[0]));
        store_shared(keys + PART_BYTES + own, pack(x[1]));
#endif
        // 8 channels a warp, 32 tokens at a time; a thread's four words are tokens 2t, 2t + 1 and
        // 8 + 2t, 8 + 2t + 1 of two groups of 16, which sparse_attention.cu wants together.
#pragma unroll
        for (int n = 0; n < 2; n++) {
            u32 m[4];
            load_transposed(m, values + (warp >> 3) * PART_BYTES + swizzled(32 * n + lane, warp & 7));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32 low = m[2 * i], high = m[2 * i + 1];
                const u32 word = pack_e4m3(__uint_as_float(low << 16) * v_factor,
                                           __uint_as_float(low & 0xFFFF0000u) * v_factor,
                                           __uint_as_float(high << 16) * v_factor,
                                           __uint_as_float(high & 0xFFFF0000u) * v_factor);
                const u32 at = swizzled(v_channel, 4 * (stage & 1) + 2 * n + i) + 4 * (lane & 3);
                store_shared(v_tile + at, word);
            }
        }
        fence_async();
        __syncthreads();
        if (thread == 0 && stage & 1)
            store_tile(v_fp8 + (long long)(stage / 2) * TILE_BYTES, v_tile);
#if LINEAR
        mma_fence();
#pragma unroll
        for (int step = 0; step < TOKENS / 16; step++) {
            const u64 a = descriptor(keys + lower * PART_BYTES + step * 2048, 1024);
            const u64 b = descriptor(values + right * PART_BYTES + step * 2048, 1024);
            multiply(products, a, b, stage + step);
            add_tokens(sums, a, ones, stage + step);
        }
        mma_commit();
        mma_wait<1>();  // of the stage before, in whose place the next copy goes
#endif
    }
#if LINEAR
    mma_wait<0>();
    const long long part = (long long)head_of_all * gridDim.x + blockIdx.x;
    const int state_row = 64 * lower + 16 * (warp & 3) + (lane >> 2);
    float *target = state + (part * HEAD_DIM + state_row) * HEAD_DIM + 64 * right + 2 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 16; i++)
        *(float2 *)(target + 8 * (i >> 1) + 8 * HEAD_DIM * (i & 1)) =
            make_float2(products[2 * i], products[2 * i + 1]);
    if (right == 0 && (lane & 3) == 0) {
        key_sum[part * HEAD_DIM + state_row] = sums[0];
        key_sum[part * HEAD_DIM + state_row + 8] = sums[2];
    }
#endif
    if (thread == 0) wait_for_tile_store();
}
