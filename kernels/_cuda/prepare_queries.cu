// int8 tiles of queries, block means, and the linear branch's result, for Hopper (sm_90a):
//
//     branch = φ(q)·matrix / (φ(q)·normalizer + eps) + bias
//
// A program takes consecutive blocks of 64 tokens of HEADS heads, for which the tables are read once.
// Each of its first warpgroups normalizes, rotates and rounds a block of its own, head by head, 8 lanes
// a token, and leaves φ(q) and sums of channels in a slot of shared memory. The last one multiplies
// the slots in turn, and stores the branch. So loads and arithmetic of some blocks run beside products
// and stores of others.
// The matrix's columns are in the order that gives a lane whole chunks of the result.
// The normalizer is the matrix's last 8 columns, as the sum of two bf16 in neighbouring ones; φ(q)'s
// scale divides out, so softmax needs no sum if eps has been added to the normalizer.

constexpr int BLOCK = 64, THREADS = 128 * (PRODUCERS + 1);
constexpr int COLUMNS = HEAD_DIM + 8, PASSES = 4;  // of 4 tokens of a warp
static_assert(PASSES % ROWS_AHEAD == 0 && SLOTS >= PRODUCERS, "places in rings and slots");
// After the last whole round no slot that is passed over may be needed again.
static_assert(HEADS <= 2 && SLOTS > PRODUCERS, "slots of blocks that do not exist");
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
    float eps, int length, int heads, int blocks, int per_part,
    long long q_batch, long long q_token, long long q_head) {
    extern __shared__ u8 memory[];
    const u32 matrices = (shared_address(memory) + 1023) & ~1023u;
    const u32 features = matrices + LINEAR * HEADS * MATRIX_BYTES;
    const u32 all_sums = features + SLOTS * SLOT_BYTES, full = all_sums + SLOTS * SUMS_BYTES;
    const u32 empty = full + 8 * SLOTS, all_weights = (empty + 8 * SLOTS + 15) & ~15u;
    const u32 rings = all_weights + HEADS * 4 * HEAD_DIM;
    const int thread = threadIdx.x, lane = thread & 31, warp = (thread >> 5) & 3, group = thread >> 7;
    const int first_head = blockIdx.y * HEADS, batch = first_head / heads, head = first_head % heads;
    const int first_block = blockIdx.x * per_part;
    const int count = min(per_part, blocks - first_block);
    const long long first_place = (long long)first_head * blocks + first_block;

    if (thread == 0) {
        for (int slot = 0; slot < SLOTS; slot++) {
            barrier_init(full + 8 * slot, 4);
            barrier_init(empty + 8 * slot, 4);
        }
        barriers_are_initialized();
    }
    if (ROTATION && thread < HEADS * HEAD_DIM / 8) {
        float values[8];
        load_weight(weight + head * HEAD_DIM + 8 * thread, values);
#pragma unroll
        for (int i = 0; i < 8; i++)
            store_shared(all_weights + 32 * thread + 4 * i, __float_as_uint(values[i] * UNIT));
    }
    __syncthreads();

    if (group < PRODUCERS) {
        give_registers<PRODUCER_REGISTERS>();
        const int piece = lane & 7, own_row = 16 * warp + (lane >> 3);  // and 4, 8, 12 after it
        const u32 even_row = swizzled(own_row, piece), odd_row = even_row ^ 64;  // of tiles
        const int first_token = (first_block + group) * BLOCK + own_row;
        const u32 stride = q_token;
        q += batch * q_batch + head * q_head + 8 * piece + first_token * (u64)stride;
        rstd += (long long)batch * length + first_token;
        turns += (u64)(u32)first_token * PAIRS + 4 * piece;
        q_int8 += (first_place + group) * TILE_BYTES;
        q_scale += (first_place + group) * BLOCK + own_row;
        int rest = length - first_token;  // tokens from this lane's first one on
        const u32 ring = rings + (4 * group + warp) * (ROWS_AHEAD * ROWS_BYTES + PASSES * TURNS_BYTES);
        const u32 turn_ring = ring + ROWS_AHEAD * ROWS_BYTES;
        auto request = [&](const u16 *source, int later, int pass) {
            const int offset = later * PRODUCERS * BLOCK + 4 * pass;
            copy_row(ring + pass % ROWS_AHEAD * ROWS_BYTES, lane, source + offset * (u64)stride,
                     offset < rest);
            commit_copies();
        };
        auto request_turns = [&](int later, int pass) {
            const int offset = later * PRODUCERS * BLOCK + 4 * pass;
            copy_turns(turn_ring + pass * TURNS_BYTES, lane, turns + offset * PAIRS, rstd + offset,
                       offset < rest);
        };
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) request_turns(0, pass);
#pragma unroll
        for (int pass = 0; pass < ROWS_AHEAD; pass++) request(q, 0, pass);
        float weights[2][8];
        float sums[2][8];  // of the block's tokens in this lane
        // Four tokens of a head, and what is asked for meanwhile: of the same block and head, else from
        // `next` on, which is the next head's, or after the last one the next block's.
        auto prepare = [&](int pass, const u16 *own, const u16 *next, bool last_head, u32 target,
                           u8 *tile, float *scale) {
            float x[2][8];
            wait_copies<ROWS_AHEAD - 1>();
            read_row(x, ring + pass % ROWS_AHEAD * ROWS_BYTES, turn_ring + pass * TURNS_BYTES, lane,
                     weights);
            if (last_head) request_turns(1, pass);
            if (pass + ROWS_AHEAD < PASSES)
                request(own, 0, pass + ROWS_AHEAD);
            else
                request(next, last_head, pass + ROWS_AHEAD - PASSES);
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int i = 0; i < 8; i++)
                    sums[half][i] = pass ? sums[half][i] + x[half][i] : x[half][i];
            const float amax = token_max(largest_magnitude(x));
            const float largest = fmaxf(amax, 1e-8f * UNIT);
            const float per_step = __fdividef(127.0f, largest);
            const u32 place = (pass & 1 ? odd_row : even_row) + 512 * pass;
            if (piece == 0) scale[4 * pass] = largest * (1.0f / (127.0f * UNIT));
            uint4 rounded;
            rounded.x = to_int8(x[0], per_step), rounded.y = to_int8(x[0] + 4, per_step);
            rounded.z = to_int8(x[1], per_step), rounded.w = to_int8(x[1] + 4, per_step);
            *(uint4 *)(tile + place) = rounded;
#if LINEAR
            keep_in_range(x, amax);
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int i = 0; i < 8; i++) x[half][i] = feature(x[half][i]);
                store_shared(target + half * PART_BYTES + place, pack(x[half]));
            }
#endif
        };
        int slot = group, parity = 1;
#pragma unroll 1
        for (int n = group, h = 0; n < count;) {
            const u32 target = features + slot * SLOT_BYTES;
            const bool last_head = HEADS == 1 || h == HEADS - 1;
            const u16 *own = q + h * q_head, *next = last_head ? q : own + q_head;
            u8 *tile = q_int8 + h * (u64)blocks * TILE_BYTES;
            float *scale = q_scale + h * (u64)blocks * BLOCK;
            if (ROTATION && (HEADS > 1 || n == group)) {
                load_shared(all_weights + h * 512 + 32 * piece, weights[0]);
                load_shared(all_weights + h * 512 + 256 + 32 * piece, weights[1]);
            }
            barrier_wait(empty + 8 * slot, parity);
#pragma unroll
            for (int pass = 0; pass < PASSES; pass++)
                prepare(pass, own, next, last_head, target, tile, scale);
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
            if (last_head) {
                q += PRODUCERS * BLOCK * (u64)stride, rest -= PRODUCERS * BLOCK;
                turns += PRODUCERS * BLOCK * PAIRS, rstd += PRODUCERS * BLOCK;
                q_int8 += PRODUCERS * TILE_BYTES, q_scale += PRODUCERS * BLOCK;
                n += PRODUCERS, h = 0;
            } else {
                h++;
            }
            slot += PRODUCERS;
            if (slot >= SLOTS) slot -= SLOTS, parity ^= 1;
        }
        wait_copies<0>();
    } else {
        take_registers<CONSUMER_REGISTERS>();
        const int g = lane >> 2, t = lane & 3, own = thread & 127;
        q_means += first_place * HEAD_DIM + own;
#if LINEAR
        for (int task = own; task < HEADS * 256; task += 128)
            place_matrix(matrices + task / 256 * MATRIX_BYTES,
                         matrix + (first_head + task / 256) * HEAD_DIM * HEAD_DIM, task / 16 % 16 * 8,
                         task % 16);
        for (int h = 0; h < HEADS; h++)
            place_normalizer(matrices + h * MATRIX_BYTES, normalizer + (first_head + h) * HEAD_DIM,
                             own / 8 * 8, own % 8, eps);
        float biases[4][8] = {};
#pragma unroll
        for (int m = 0; m < 4; m++)
            if (bias) load_floats(bias + 32 * m + 8 * t, biases[m]);
        fence_async();
        wait_for_warpgroup(1);
#endif
        branch += ((long long)batch * length * heads + head) * HEAD_DIM + 8 * t;
        // Slots come as the warpgroups fill them: each one's block of the first head, of the next.
        int slot = -1, parity = 0;
#pragma unroll 1
        for (int producer = 0, h = 0, first = 0; first < count; producer++) {
            if (producer == PRODUCERS) {
                producer = 0;
                if (++h == HEADS) h = 0, first += PRODUCERS;
            }
            if (++slot == SLOTS) slot = 0, parity ^= 1;
            const int n = first + producer, first_token = (first_block + n) * BLOCK;
            if (n >= count) continue;
            barrier_wait(full + 8 * slot, parity);
#if LINEAR
            float d[68];
            mma_fence();
#pragma unroll
            for (int step = 0; step < 8; step++) {
                const u32 half = step >> 2, columns = 32 * (step & 3);
                multiply(d, descriptor(features + slot * SLOT_BYTES + half * PART_BYTES + columns),
                         descriptor(matrices + h * MATRIX_BYTES + half * HALF_BYTES + columns), step);
            }
            mma_commit();
#endif
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; i++)
                sum += load_shared_float(all_sums + slot * SUMS_BYTES + i * 512 + 4 * own);
            q_means[(h * (u64)blocks + n) * HEAD_DIM] =
                __fdividef(sum, UNIT * min(BLOCK, length - first_token));
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
                u16 *target = branch + (token * (u64)(u32)heads + h) * HEAD_DIM;
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
        }
    }
}
