// int8 tiles of smoothed keys, e4m3 tiles of values, and the state of the linear branch, φ(k)ᵀv and
// Σφ(k), for Hopper (sm_90a). Tiles lie as sparse_attention.cu wants them.
//
// A program takes `per_part` consecutive blocks of one head in stages of 64 tokens. Its first
// warpgroups take a stage each, 8 lanes a token: they store k's tile, and leave φ(k) and v in a slot of
// shared memory in the layout of the tensor cores' operands, channels along rows of 128 bytes
// (swizzled, lower and upper 64 channels apart). The last warpgroup holds the state: it multiplies the
// slots in turn, meanwhile transposes v and stores its tiles. Σφ(k) is a product with ones, so that it
// sums the φ(k) that φ(k)ᵀv sums, rounded to bf16.

constexpr int BLOCK = 128, THREADS = 128 * (PRODUCERS + 1), TOKENS = 64, PASSES = 4;
constexpr u32 PART_BYTES = TOKENS * 128, SLOT_BYTES = 4 * PART_BYTES, TILE_BYTES = BLOCK * HEAD_DIM;
constexpr u32 ONES_BYTES = 512;
static_assert(SLOTS >= PRODUCERS, "a slot for each");
static_assert(ROWS_AHEAD <= 2, "v has to be there when the last pass begins");

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

// d (64×128) = a (64×16) · b (16×128) + d, or without d; both bf16 in shared memory, tokens as rows
DEVICE void multiply(float (&d)[64], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " NAMES64
                 ", %64, %65, add, 1, 1, 1, 1;\n}\n"
                 : R8("+f", 0), R8("+f", 8), R8("+f", 16), R8("+f", 24), R8("+f", 32), R8("+f", 40),
                   R8("+f", 48), R8("+f", 56)
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

// φ of a token's 16 channels in this lane; 0 if the token does not exist.
DEVICE void take_features(float (&x)[2][8], bool exists, bool large) {
    if (MAP == 0 && large) subtract_largest(x);
    float factor = exists ? 1.0f : 0.0f, sums[2] = {};
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x[half][i] = feature(x[half][i]);
            if (MAP == 0) sums[half] += x[half][i];
        }
#if MAP == 0
    factor *= reciprocal(token_sum(sums[0] + sums[1]));
#endif
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 8; i++) x[half][i] *= factor;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) prepare_keys(
    const u16 *k,          // head h of token t of batch b at b·k_batch + t·k_token + h·k_head
    const u16 *v,          // as k
    const float *rstd,     // (B, L)
    const Weight *weight,  // (H·128,), or null
    const u32 *turns,      // (L, 64) of measure_rms.cu, or null: k is used as it is
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
    const u32 slots = (shared_address(memory) + 1023) & ~1023u;
    const u32 tiles = slots + SLOTS * SLOT_BYTES, ones = tiles + 2 * TILE_BYTES;
    const u32 factors = ones + ONES_BYTES;  // 1 / v_scale
    const u32 full = factors + 4 * HEAD_DIM, empty = full + 8 * SLOTS;
    const u32 scales = empty + 8 * SLOTS;  // two for each warp
    const u32 rings = (scales + 4 * PRODUCERS * 8 + RING_ALIGNMENT - 1) & ~(RING_ALIGNMENT - 1);
    const int thread = threadIdx.x, lane = thread & 31, warp = uniform((thread >> 5) & 3);
    const int group = uniform(thread >> 7);
    const int head_of_all = blockIdx.x, batch = head_of_all / heads, head = head_of_all % heads;
    const int first_block = blockIdx.y * per_part;
    const int stages = 2 * (min(first_block + per_part, blocks) - first_block);

    if (thread == 0) {
        for (int slot = 0; slot < SLOTS; slot++) {
            barrier_init(full + 8 * slot, 4);
            barrier_init(empty + 8 * slot, 4);
        }
        barriers_are_initialized();
    }
    if (thread < HEAD_DIM) {
        const float factor = 1.0f / v_scale[head_of_all * HEAD_DIM + thread];
        store_shared(factors + 4 * thread, __float_as_uint(factor));
    }
#if LINEAR
    if (thread < ONES_BYTES / 16)
        store_shared(ones + 16 * thread, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u);
    fence_async();
#endif
    __syncthreads();

    const long long first_tile = ((long long)head_of_all * blocks + first_block) * TILE_BYTES;
    if (group < PRODUCERS) {
        give_registers<PRODUCER_REGISTERS>();
        const int piece = lane & 7, own_row = 16 * warp + (lane >> 3);  // and 4, 8, 12 after it
        const u32 even_row = swizzled(own_row, piece), odd_row = even_row ^ 64;
        const int first_token = first_block * BLOCK + group * TOKENS + own_row;
        const u32 k_stride = k_token, v_stride = v_token;
        k += batch * k_batch + head * k_head + 8 * piece + first_token * (u64)k_stride;
        v += batch * v_batch + head * v_head + 8 * piece + first_token * (u64)v_stride;
        turns += (u64)(u32)first_token * PAIRS + 4 * piece;
        k_scale += (long long)head_of_all * blocks + first_block;
        k_int8 += first_tile + group * PART_BYTES;
        int rest = length - first_token;  // tokens from this lane's first one on
        auto place = [&](int pass) { return (pass & 1 ? odd_row : even_row) + 512 * pass; };
        constexpr u32 WARP_BYTES = ROWS_AHEAD * (ROWS_BYTES + TURNS_BYTES) + 2 * NORMS_BYTES;
        const u32 ring = rings + (4 * group + warp) * WARP_BYTES;
        const u32 turn_ring = ring + ROWS_AHEAD * ROWS_BYTES;
        u32 own_norms = turn_ring + ROWS_AHEAD * TURNS_BYTES, own_scale = scales + 8 * (4 * group + warp);
        auto request = [&](int later, int pass, int n) {
            const int offset = later * PRODUCERS * TOKENS + 4 * pass;
            copy_row(ring + pass % ROWS_AHEAD * ROWS_BYTES, lane, k + offset * (u64)k_stride,
                     offset < rest);
            copy_turns(turn_ring + pass % ROWS_AHEAD * TURNS_BYTES, lane, turns + offset * PAIRS,
                       offset < rest);
            if (ROTATION && pass == 0 && lane < 16) {  // lane l copies that of the warp's token l
                const int ahead = offset + lane - (lane >> 3);
                copy_word((later ? own_norms ^ NORMS_BYTES : own_norms) + 4 * lane,
                          rstd + (u32)(batch * length + length - rest + ahead), ahead < rest);
            }
            if (pass == 0 && lane == 16)
                copy_word(later ? own_scale ^ 4 : own_scale, k_scale + n / 2, n < stages);
            commit_copies();
        };
#pragma unroll
        for (int pass = 0; pass < ROWS_AHEAD; pass++) request(0, pass, group);
        float mean[2][8], weights[2][8];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            load_floats(k_mean + head_of_all * HEAD_DIM + 64 * half + 8 * piece, mean[half]);
#pragma unroll
            for (int i = 0; i < 8; i++) mean[half][i] *= UNIT;
        }
        const float largest_mean = largest_magnitude(mean);
        load_weights(weight + head * HEAD_DIM + 8 * piece, weights);
        int slot = group, parity = 1;
#pragma unroll 1
        for (int n = group; n < stages; n += PRODUCERS) {
            const u32 keys = slots + slot * SLOT_BYTES, values = keys + 2 * PART_BYTES;
            float per_step;
            bool large;  // by a block's scale, what is rounded lies within 127 steps
#pragma unroll
            for (int pass = 0; pass < PASSES; pass++) {
                const bool exists = 4 * pass < rest;
                const u32 own = place(pass);
                float x[2][8];
                wait_copies<ROWS_AHEAD - 1>();
                if (pass == 0) {
                    __syncwarp();  // what other lanes have copied
                    const float scale = load_shared_float(own_scale);
                    per_step = reciprocal(UNIT * scale);
                    large = __any_sync(ALL_LANES, fmaf(127.0f * UNIT, scale, largest_mean) > LARGE);
                }
                const float norm = load_shared_float(own_norms + 16 * pass + 4 * (lane >> 3));
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float2 angles[4];
                    read_angles(angles, turn_ring + pass % ROWS_AHEAD * TURNS_BYTES, norm, lane, half);
                    read_row(x[half], ring + pass % ROWS_AHEAD * ROWS_BYTES, lane, angles, weights[half],
                             half, mean[half]);
                }
                if (pass == 0) barrier_wait(empty + 8 * slot, parity);
                if (pass < 2)  // half of v each: it is there when the last pass begins
#pragma unroll
                    for (int other = 2 * pass; other < 2 * pass + 2; other++) {
                        const u32 target = values + place(other);
                        const u16 *value = v + 4 * other * (u64)v_stride;
                        copy_chunk(target, value, 4 * other < rest);
                        copy_chunk(target + PART_BYTES, value + 64, 4 * other < rest);
                    }
                request(pass + ROWS_AHEAD >= PASSES, (pass + ROWS_AHEAD) % PASSES, n + PRODUCERS);
                const float factor = exists ? per_step : 0.0f;
                uint4 rounded;
                rounded.x = to_int8(x[0], factor), rounded.y = to_int8(x[0] + 4, factor);
                rounded.z = to_int8(x[1], factor), rounded.w = to_int8(x[1] + 4, factor);
                *(uint4 *)(k_int8 + own) = rounded;
#if LINEAR
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int i = 0; i < 8; i++) x[half][i] += mean[half][i];
                take_features(x, exists, large);
                store_shared(keys + own, pack(x[0]));
                store_shared(keys + PART_BYTES + own, pack(x[1]));
#endif
            }
            fence_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(full + 8 * slot);
            k += PRODUCERS * TOKENS * (u64)k_stride, v += PRODUCERS * TOKENS * (u64)v_stride;
            turns += PRODUCERS * TOKENS * PAIRS, rest -= PRODUCERS * TOKENS;
            k_int8 += PRODUCERS * PART_BYTES, own_norms ^= NORMS_BYTES, own_scale ^= 4;
            slot += PRODUCERS;
            if (slot >= SLOTS) slot -= SLOTS, parity ^= 1;
        }
        wait_copies<0>();
    } else {
        take_registers<CONSUMER_REGISTERS>();
        const bool stores = (thread & 127) == 0;
        v_fp8 += first_tile;
        float own_factors[16];  // of the channels that a lane holds after a transposition
#pragma unroll
        for (int i = 0; i < 16; i++)
            own_factors[i] = load_shared_float(factors + 4 * (8 * i + (lane >> 2)));
#if LINEAR
        float lower[64], upper[64], lower_sums[4], upper_sums[4];  // set by the first products
#endif
        int slot = 0, parity = 0;
#pragma unroll 1
        for (int n = 0; n < stages; n++) {
            barrier_wait(full + 8 * slot, parity);
            const u32 keys = slots + slot * SLOT_BYTES, tile = tiles + (n >> 1 & 1) * TILE_BYTES;
#if LINEAR
            mma_fence();
            const u64 first_a = descriptor(keys), first_b = descriptor(keys, PART_BYTES);
#pragma unroll
            for (int step = 0; step < TOKENS / 16; step++) {
                const u64 a = moved(first_a, 2048 * step), other_a = moved(a, PART_BYTES);
                const u64 b = moved(first_b, 2048 * step + 2 * PART_BYTES);
                multiply(lower, a, b, n + step);
                multiply(upper, other_a, b, n + step);
                add_tokens(lower_sums, a, ones, n + step);
                add_tokens(upper_sums, other_a, ones, n + step);
            }
            mma_commit();
#endif
            // A warp transposes 16 tokens, 16 channels at a time; a lane's two words are tokens 2t,
            // 2t + 1, 8 + 2t and 8 + 2t + 1, which sparse_attention.cu wants together.
            u32 next[4];
            auto request = [&](int j) {
                load_transposed(next, keys + (2 + (j >> 2)) * PART_BYTES +
                                          swizzled(16 * warp + (lane & 15), 2 * (j & 3) + (lane >> 4)));
            };
            request(0);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const u32 m[4] = {next[0], next[1], next[2], next[3]};
                if (j < 7) request(j + 1);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int channel = 8 * (2 * j + i) + (lane >> 2);
                    const float factor = own_factors[2 * j + i];
                    const u32 low = m[2 * i], high = m[2 * i + 1];
                    const u32 word = pack_e4m3(__uint_as_float(low << 16) * factor,
                                               __uint_as_float(low & 0xFFFF0000u) * factor,
                                               __uint_as_float(high << 16) * factor,
                                               __uint_as_float(high & 0xFFFF0000u) * factor);
                    store_shared(tile + swizzled(channel, 4 * (n & 1) + warp) + 4 * (lane & 3), word);
                }
            }
#if LINEAR
            mma_wait<0>();
#endif
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + 8 * slot);
            if (n & 1) {  // the tile is whole, and the other one, if it has been read, can be written
                fence_async();
                if (stores) wait_for_tile_read();
                wait_for_warpgroup(1);
                if (stores) store_tile(v_fp8 + n / 2 * (u64)TILE_BYTES, tile);
            }
            if (++slot == SLOTS) slot = 0, parity ^= 1;
        }
#if LINEAR
        const long long part = (long long)head_of_all * gridDim.y + blockIdx.y;
        const int state_row = 16 * warp + (lane >> 2);
        float *target = state + (part * HEAD_DIM + state_row) * HEAD_DIM + 2 * (lane & 3);
#pragma unroll
        for (int i = 0; i < 32; i++) {
            float *at = target + 8 * (i >> 1) + 8 * HEAD_DIM * (i & 1);
            *(float2 *)at = make_float2(lower[2 * i], lower[2 * i + 1]);
            *(float2 *)(at + 64 * HEAD_DIM) = make_float2(upper[2 * i], upper[2 * i + 1]);
        }
        if ((lane & 3) == 0) {
            float *sums = key_sum + part * HEAD_DIM + state_row;
            sums[0] = lower_sums[0], sums[8] = lower_sums[2];
            sums[64] = upper_sums[0], sums[72] = upper_sums[2];
        }
#endif
        if (stores) wait_for_tile_store();
    }
}
