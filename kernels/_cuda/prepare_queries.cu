// int8 tiles of queries, block means, and the linear branch's result, for Hopper (sm_90a):
//
//     branch = φ(q)·matrix / (φ(q)·normalizer + eps) + bias
//
// A task is `per_part` consecutive blocks of 64 tokens of one head; tasks of the same tokens are next to
// each other, as their heads lie in memory and read the same tables. A program takes one task after
// the other. Each of its first warpgroups normalizes, rotates and rounds a block of its own, 8 lanes a
// token, and leaves φ(q) and sums of channels in a slot of shared memory. The last one multiplies the
// slots in turn, and stores the branch. So loads and arithmetic of some blocks run beside products and
// stores of others, across tasks too.
// The matrix's columns are in the order that gives a lane whole chunks of the result.
// The normalizer is the matrix's last 8 columns, as the sum of two bf16 in neighbouring ones; φ(q)'s
// scale divides out, so softmax needs no sum if eps has been added to the normalizer.

constexpr int BLOCK = 64, THREADS = 128 * (PRODUCERS + 1);
constexpr int COLUMNS = HEAD_DIM + 8, PASSES = 4;  // of 4 tokens of a warp
static_assert(PASSES % ROWS_AHEAD == 0, "places in rings");
static_assert(SLOTS >= PRODUCERS, "a slot for each");
constexpr u32 HALF_BYTES = COLUMNS * 128, MATRIX_BYTES = 2 * HALF_BYTES;
constexpr u32 TILE_BYTES = BLOCK * HEAD_DIM, SUMS_BYTES = 4 * HEAD_DIM * 4;
constexpr u32 PART_BYTES = BLOCK * 128;  // 64 channels of φ(q)
constexpr u32 SLOT_BYTES = LINEAR * 2 * PART_BYTES;

// d (64×136) = a (64×16) · b (136×16)ᵀ + d, or without d; both bf16 in shared memory
DEVICE void multiply(float (&d)[68], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %70, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n136k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
        "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,"
        "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67}, "
        "%68, %69, add, 1, 1, 0, 0;\n}\n"
        : R8("+f", 0), R8("+f", 8), R8("+f", 16), R8("+f", 24), R8("+f", 32), R8("+f", 40),
          R8("+f", 48), R8("+f", 56), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
        : "l"(a), "l"(b), "r"(add));
}

DEVICE u32 select_half(u32 a, u32 b, int upper) { return __byte_perm(a, b, upper ? 0x7632 : 0x5410); }

// φ of a token's 16 channels in this lane.
DEVICE void take_features(Chunk (&features)[2], const float (&x)[2][8]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = feature(x[half][i]);
        features[half] = pack(values);
    }
}

// Of eight rows from `k` on: `chunk` is eight channels of the result, which become 8 columns.
DEVICE void place_matrix(u32 target, const u16 *matrix, int k, int chunk) {
    Chunk rows[8];
#pragma unroll
    for (int i = 0; i < 8; i++) rows[i] = *(const Chunk *)(matrix + (k + i) * HEAD_DIM + 8 * chunk);
    target += (k >> 6) * HALF_BYTES;
#pragma unroll
    for (int c = 0; c < 8; c++) {
        const int column = 8 * (4 * (chunk >> 2) + (c >> 1)) + 2 * (chunk & 3) + (c & 1);
        u32 pairs[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            pairs[i] = select_half(rows[2 * i].pairs[c >> 1], rows[2 * i + 1].pairs[c >> 1], c & 1);
        store_shared(target + swizzled(column, (k & 63) >> 3), pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

// Of eight rows from `k` on: the column HEAD_DIM + `c`, the leading or the remaining part.
DEVICE void place_normalizer(u32 target, const float *normalizer, int k, int c, float eps) {
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float value = normalizer[k + i] + (MAP == 0 ? eps : 0.0f);
        const float leading = __uint_as_float(pack_bf16(value, 0.0f) << 16);
        values[i] = c & 1 ? value - leading : leading;
    }
    store_shared(target + (k >> 6) * HALF_BYTES + swizzled(HEAD_DIM + c, (k & 63) >> 3), pack(values));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) prepare_queries(
    const u16 *q,             // head h of token t of batch b at b·q_batch + t·q_token + h·q_head
    const float *rstd,        // (B, L)
    const Weight *weight,     // (H·128,), or null
    const u32 *turns,         // (L, 64) of measure_rms.cu, or null: q is used as it is
    const u16 *matrix,        // (B·H, 128, 128) bf16: φ(q)'s channel, the result's; not if LINEAR is 0
    const float *normalizer,  // (B·H, 128)
    const float *bias,        // (128,), or null
    u8 *q_int8,               // (B·H, NQ, 64, 128): token, channels as tokens.cuh orders them
    float *q_scale,           // (B·H, NQ, 64)
    float *q_means,           // (B·H, NQ, 128)
    u16 *branch,              // (B, L, H, 128) bf16
    float eps, int length, int heads, int all_heads, int blocks, int per_part, int tasks,
    long long q_batch, long long q_token, long long q_head) {
    extern __shared__ u8 memory[];
    const u32 own_matrix = (shared_address(memory) + 1023) & ~1023u;
    const u32 features = own_matrix + LINEAR * MATRIX_BYTES;
    const u32 all_sums = features + SLOTS * SLOT_BYTES, full = all_sums + SLOTS * SUMS_BYTES;
    const u32 empty = full + 8 * SLOTS;
    const u32 rings = (empty + 8 * SLOTS + RING_ALIGNMENT - 1) & ~(RING_ALIGNMENT - 1);
    const int thread = threadIdx.x, lane = thread & 31, warp = uniform((thread >> 5) & 3);
    const int group = uniform(thread >> 7);
    auto blocks_of = [&](int task) { return min(per_part, blocks - task / all_heads * per_part); };

    if (thread == 0) {
        for (int slot = 0; slot < SLOTS; slot++) {
            barrier_init(full + 8 * slot, 4);
            barrier_init(empty + 8 * slot, 4);
        }
        barriers_are_initialized();
    }
    __syncthreads();

    if (group < PRODUCERS) {
        give_registers<PRODUCER_REGISTERS>();
        const int piece = lane & 7, own_row = 16 * warp + (lane >> 3);  // and 4, 8, 12 after it
        const u32 even_row = swizzled(own_row, piece), odd_row = even_row ^ 64;  // of tiles
        const int token_of_lane = 16 * warp + lane;  // lane l copies the norm of the warp's token l
        const u32 stride = q_token;
        // A block that a warpgroup takes.
        struct Place {
            int task, n, count;      // the n-th of `count` blocks of the task
            int head_of_all, block;  // of the head's blocks; one behind the last if there is no such task
            int first_row;           // of the batch in `rstd`
            const u16 *token;        // of the lane's tokens the first one's channels
        };
        auto locate = [&](int task, int n) {
            while (task < tasks && n >= blocks_of(task)) n -= blocks_of(task), task += gridDim.x;
            const int head_of_all = task % all_heads, batch = head_of_all / heads;
            const int block = task < tasks ? task / all_heads * per_part + n : blocks;
            const u16 *of_head = q + batch * q_batch + head_of_all % heads * q_head + 8 * piece;
            return Place{task, n, blocks_of(task), head_of_all, block, batch * length,
                         of_head + (block * BLOCK + own_row) * (u64)stride};
        };
        auto after = [&](const Place &place) {
            const int n = place.n + PRODUCERS;
            if (n >= place.count) return locate(place.task, n);
            Place next = place;
            next.n = n, next.block += PRODUCERS, next.token += PRODUCERS * BLOCK * (u64)stride;
            return next;
        };
        constexpr u32 RING_BYTES = ROWS_BYTES + TURNS_BYTES;
        const u32 ring = rings + (4 * group + warp) * (ROWS_AHEAD * RING_BYTES + 2 * NORMS_BYTES);
        u32 own_norms = ring + ROWS_AHEAD * RING_BYTES;
        auto request = [&](const Place &of, u32 norms, int pass) {
            const int token = of.block * BLOCK + own_row + 4 * pass;
            const u32 target = ring + pass % ROWS_AHEAD * RING_BYTES;
            copy_row(target, lane, of.token + 4 * pass * (u64)stride, token < length);
            copy_turns(target + ROWS_BYTES, lane, turns + (u64)(u32)token * PAIRS + 4 * piece,
                       token < length);
            const int copied = of.block * BLOCK + token_of_lane;
            if (ROTATION && pass == 0 && lane < 16)
                copy_word(norms + 4 * lane, rstd + (u32)(of.first_row + copied), copied < length);
            commit_copies();
        };
        Place place = locate(blockIdx.x, group);
#pragma unroll
        for (int pass = 0; pass < ROWS_AHEAD; pass++) request(place, own_norms, pass);
        float weights[2][8];
        int slot = group, parity = 1, weighted = -1;
#pragma unroll 1
        while (place.task < tasks) {
            const Place next = after(place);
            if (place.head_of_all != weighted) {
                weighted = place.head_of_all;
                load_weights(weight + weighted % heads * HEAD_DIM + 8 * piece, weights);
            }
            const u64 index = (u64)(u32)place.head_of_all * (u32)blocks + (u32)place.block;
            u8 *tile = q_int8 + index * TILE_BYTES;
            float *scale = q_scale + index * BLOCK + own_row;
            float sums[2][8];  // of the block's tokens in this lane
#pragma unroll
            for (int pass = 0; pass < PASSES; pass++) {
                const u32 source = ring + pass % ROWS_AHEAD * RING_BYTES;
                const u32 row = (pass & 1 ? odd_row : even_row) + 512 * pass;
                float x[2][8];
                wait_copies<ROWS_AHEAD - 1>();
                if (pass == 0) __syncwarp();  // norms that other lanes have copied
                const float norm = load_shared_float(own_norms + 16 * pass + 4 * (lane >> 3));
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float2 angles[4];
                    read_angles(angles, source + ROWS_BYTES, norm, lane, half);
                    read_row(x[half], source, lane, angles, weights[half], half);
                }
                if (pass + ROWS_AHEAD < PASSES)
                    request(place, own_norms, pass + ROWS_AHEAD);
                else
                    request(next, own_norms ^ NORMS_BYTES, pass + ROWS_AHEAD - PASSES);
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        sums[half][i] = pass ? sums[half][i] + x[half][i] : x[half][i];
                if (pass == 0) barrier_wait(empty + 8 * slot, parity);
                const float own_largest = largest_magnitude(x);
                float largest;
#if LINEAR
                // φ(q) is taken while the token's largest channel is on its way between lanes.
                Chunk phi[2];
                if (MAP == 0 && __any_sync(ALL_LANES, own_largest > LARGE)) {
                    largest = token_max(own_largest);
                    float lowered[2][8];
                    memcpy(lowered, x, sizeof x);
                    subtract_largest(lowered);
                    take_features(phi, lowered);
                } else {
                    take_features(phi, x);
                    largest = token_max(own_largest);
                }
                store_shared(features + slot * SLOT_BYTES + row, phi[0]);
                store_shared(features + slot * SLOT_BYTES + PART_BYTES + row, phi[1]);
#else
                largest = token_max(own_largest);
#endif
                largest = fmaxf(largest, 1e-8f * UNIT);
                const float per_step = 127.0f * reciprocal(largest);
                if (piece == 0) scale[4 * pass] = largest * (1.0f / (127.0f * UNIT));
                uint4 rounded;
                rounded.x = to_int8(x[0], per_step), rounded.y = to_int8(x[0] + 4, per_step);
                rounded.z = to_int8(x[1], per_step), rounded.w = to_int8(x[1] + 4, per_step);
                *(uint4 *)(tile + row) = rounded;
            }
            // The 4 tokens of a warp: each lane keeps half of its channels, then a quarter.
            const bool upper = lane & 16, later = lane & 8;
            float kept[8], quarter[4];
#pragma unroll
            for (int i = 0; i < 8; i++)
                kept[i] = (upper ? sums[1][i] : sums[0][i]) +
                          __shfl_xor_sync(ALL_LANES, upper ? sums[0][i] : sums[1][i], 16);
#pragma unroll
            for (int i = 0; i < 4; i++)
                quarter[i] = (later ? kept[4 + i] : kept[i]) +
                             __shfl_xor_sync(ALL_LANES, later ? kept[i] : kept[4 + i], 8);
            const int channel = 64 * upper + 8 * piece + 4 * later;
            store_shared(all_sums + slot * SUMS_BYTES + warp * 512 + 4 * channel,
                         __float_as_uint(quarter[0]), __float_as_uint(quarter[1]),
                         __float_as_uint(quarter[2]), __float_as_uint(quarter[3]));
            fence_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(full + 8 * slot);
            place = next, own_norms ^= NORMS_BYTES;
            slot += PRODUCERS;
            if (slot >= SLOTS) slot -= SLOTS, parity ^= 1;
        }
        wait_copies<0>();
    } else {
        take_registers<CONSUMER_REGISTERS>();
        const int g = lane >> 2, t = lane & 3, own = thread & 127;
        int slot = 0, parity = 0;
#if LINEAR
        float biases[4][8] = {};
#pragma unroll
        for (int m = 0; m < 4; m++)
            if (bias) load_floats(bias + 32 * m + 8 * t, biases[m]);
#endif
#pragma unroll 1
        for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
            const int head_of_all = task % all_heads, batch = head_of_all / heads;
            const int first_block = task / all_heads * per_part, count = blocks_of(task);
            float *means = q_means + ((u64)(u32)head_of_all * (u32)blocks + first_block) * HEAD_DIM + own;
            u16 *of_head = branch + ((long long)batch * length * heads + head_of_all % heads) * HEAD_DIM;
#if LINEAR
            wait_for_warpgroup(1);  // the last products have read the matrix
            for (int i = own; i < 256; i += 128)
                place_matrix(own_matrix, matrix + head_of_all * HEAD_DIM * HEAD_DIM, i / 16 * 8, i % 16);
            place_normalizer(own_matrix, normalizer + head_of_all * HEAD_DIM, own / 8 * 8, own % 8, eps);
            fence_async();
            wait_for_warpgroup(1);
#endif
#pragma unroll 1
            for (int n = 0; n < count; n++) {
                const int first_token = (first_block + n) * BLOCK;
                barrier_wait(full + 8 * slot, parity);
#if LINEAR
                float d[68];
                mma_fence();
                const u64 a = descriptor(features + slot * SLOT_BYTES);
                const u64 b = descriptor(own_matrix);
#pragma unroll
                for (int step = 0; step < 8; step++) {
                    const u32 half = step >> 2, columns = 32 * (step & 3);
                    multiply(d, moved(a, half * PART_BYTES + columns), moved(b, half * HALF_BYTES + columns),
                             step);
                }
                mma_commit();
#endif
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    sum += load_shared_float(all_sums + slot * SUMS_BYTES + i * 512 + 4 * own);
                means[n * HEAD_DIM] = __fdividef(sum, UNIT * min(BLOCK, length - first_token));
#if LINEAR
                mma_wait<0>();
#endif
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + 8 * slot);
#if LINEAR
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const u32 token = first_token + 16 * warp + g + 8 * r;
                    if (token >= length) continue;
                    const float divisor = d[64 + 2 * r] + d[65 + 2 * r] + (MAP == 0 ? 0.0f : eps);
                    const float factor = __fdividef(1.0f, divisor);
                    u16 *target = of_head + token * (u64)(u32)heads * HEAD_DIM + 8 * t;
#pragma unroll
                    for (int m = 0; m < 4; m++) {
                        float result[8];
#pragma unroll
                        for (int i = 0; i < 8; i++)
                            result[i] = fmaf(d[16 * m + 4 * (i >> 1) + 2 * r + (i & 1)], factor,
                                             biases[m][i]);
                        *(Chunk *)(target + 32 * m) = pack(result);
                    }
                }
#endif
                if (++slot == SLOTS) slot = 0, parity ^= 1;
            }
        }
    }
}
