// Attention of many queries to the few keys of a padded prompt, for Hopper (sm_90a).
//
//     o = softmax(scale · q·kᵀ)·v,  D = 128, bf16; the padding's key counts as often as it stands there
//
// `arrange_tiles` gathers the keys before the padding and one of it, 64 to a tile, as the tensor cores
// read them from shared memory (rows of 128 bytes, 16-byte chunks exchanged by `chunk ^ (row % 8)`),
// so one bulk copy brings a tile; what is beyond the last key is zero. `attend_padded` then goes over
// groups of CONSUMERS · 64 queries: a warpgroup takes 64 of them, one more brings tiles into STAGES
// slots. Tiles that all fit stay where they are until the head changes; others are brought anew for
// each group. Softmax runs online in base 2 (arXiv 1805.02867), and P is rounded to bf16.
//
// Queries are multiplied from registers. A thread loads channels 32j + 8t … 8t + 7 of its two rows (t:
// its lane modulo 4), 16 bytes at a time; `key_channel` orders those of the keys such that they are its
// operands. It holds columns 8j + 2t and 8j + 2t + 1 of a product; `value_channel` orders the channels
// of v such that these are RUN neighbours of the result, which so leaves the registers in 16 bytes.
//
// Barriers of a slot: `filled` (one arrival, of the copying thread, and its bytes) and `read` (one
// arrival of each consumer warp, when it is done with what a copy brought).

#ifndef CONSUMERS
#define CONSUMERS 3
#endif
#ifndef STAGES
#define STAGES 7
#endif

constexpr int HEAD_DIM = 128, KEYS = 64, ROWS = 64;
constexpr int THREADS = (CONSUMERS + 1) * 128;
constexpr u32 HALF_BYTES = KEYS * 128, K_BYTES = 2 * HALF_BYTES, V_BYTES = HEAD_DIM * 128;
constexpr u32 TILE_BYTES = K_BYTES + V_BYTES;
constexpr int RUN = QUANTIZED ? 16 : 8;  // 16 bytes of the result
constexpr int RUNS = 32 / RUN;           // of a thread in a row
// Up to here an exponent is right to 2⁻¹⁴ whose product with the scale is not rounded, unlike the maximum.
constexpr float LARGEST_EXACT = 1024.0f;
// What is granted at the start, then moved from the warpgroup that copies to those that multiply.
constexpr int GRANTED = 65536 / THREADS / 8 * 8, COPYING_REGISTERS = CONSUMERS == 2 ? 24 : 32;
constexpr int MULTIPLYING_REGISTERS = GRANTED + (GRANTED - COPYING_REGISTERS) / CONSUMERS / 8 * 8;
static_assert(MULTIPLYING_REGISTERS <= 240, "beyond, fewer are left to copy with");

// The channel at 0 … 127 along the sum of q·kᵀ, an even one and its neighbour together.
DEVICE int key_channel(int place) {
    const int step = place / 16, within = place % 16;
    return 32 * (step / 2) + within % 8 / 2 * 8 + 4 * (step % 2) + within / 8 * 2 + within % 2;
}

// The channel whose sum is column 0 … 127 of P·v.
DEVICE int value_channel(int column) {
    const int within = column % (4 * RUN);
    return column / (4 * RUN) * (4 * RUN) + within % 8 / 2 * RUN + within / 8 * 2 + within % 2;
}

struct Strides {  // in elements; channels are contiguous
    long long batch, head, token;
};

extern "C" __global__ void __launch_bounds__(256) arrange_tiles(
    const u16 *k, Strides k_strides,  // (B, H, T, 128) bf16
    const u16 *v, Strides v_strides,  // as k
    const int *start,                 // (B): from here on all tokens are alike
    char *tiles,                      // (B·H, ⌈T / 64⌉, TILE_BYTES)
    int keys, int heads) {
    const int batch = blockIdx.y / heads, head = blockIdx.y % heads, first = blockIdx.x * KEYS;
    const int padding = start[batch];
    k += batch * k_strides.batch + head * k_strides.head;
    v += batch * v_strides.batch + head * v_strides.head;
    char *const k_tile = tiles + (long long)(blockIdx.y * gridDim.x + blockIdx.x) * TILE_BYTES;
    char *const v_tile = k_tile + K_BYTES;
    for (int index = threadIdx.x; index < KEYS * 16; index += 256) {
        const int row = index / 16, chunk = index % 16, key = first + row;
        const u16 *const source = k + (key < padding ? key : keys - 1) * k_strides.token;
        Chunk values = {};
        if (key <= padding)
#pragma unroll
            for (int i = 0; i < 4; i++)
                values.pairs[i] = *(const u32 *)(source + key_channel(8 * chunk + 2 * i));
        *(Chunk *)(k_tile + chunk / 8 * HALF_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16) = values;
    }
    for (int index = threadIdx.x; index < HEAD_DIM * 8; index += 256) {
        const int column = index % HEAD_DIM, chunk = index / HEAD_DIM;
        const int channel = value_channel(column);
        u32 values[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int key = first + 8 * chunk + i;
            const long long token = key < padding ? key : keys - 1;
            values[i] = key <= padding ? v[token * v_strides.token + channel] : 0;
        }
        Chunk packed;
#pragma unroll
        for (int i = 0; i < 4; i++) packed.pairs[i] = values[2 * i] | values[2 * i + 1] << 16;
        *(Chunk *)(v_tile + column * 128 + (chunk ^ column % 8) * 16) = packed;
    }
}

#define R32(x) R8(x, 0), R8(x, 8), R8(x, 16), R8(x, 24)
#define NAMES32                                                                                    \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"  \
    "%25,%26,%27,%28,%29,%30,%31}"

// d (64×64, float) = or += a (64×16 bf16, registers) · b (64×16 bf16, shared)ᵀ
template <bool ADD> DEVICE void multiply_keys(float (&d)[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " NAMES32
                 ", {%32,%33,%34,%35}, %36, %37, 1, 1, 0;"
                 : R32("+f")
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(ADD));
}

// d (64×128, float) = or += a (64×16 bf16, registers) · b (128×16 bf16, shared)ᵀ
template <bool ADD>
DEVICE void multiply_values(float (&d)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " NAMES64
                 ", {%64,%65,%66,%67}, %68, %69, 1, 1, 0;"
                 : R64("+f")
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(ADD));
}

DEVICE void start_scores(float (&s)[32], const Chunk (&q)[2][4], u32 k_tile) {
    const u64 b = descriptor(k_tile);
    mma_fence();
#pragma unroll
    for (int step = 0; step < 8; step++) {
        const u64 place = b + step / 4 * (HALF_BYTES >> 4) + step % 4 * 2;
        const u32 *const upper = q[0][step / 2].pairs + 2 * (step % 2);
        const u32 *const lower = q[1][step / 2].pairs + 2 * (step % 2);
        if (step == 0)
            multiply_keys<false>(s, upper[0], lower[0], upper[1], lower[1], place);
        else
            multiply_keys<true>(s, upper[0], lower[0], upper[1], lower[1], place);
    }
    mma_commit();
}

template <bool ADD> DEVICE void start_output(float (&sums)[64], const u32 (&p)[16], u32 v_tile) {
    const u64 b = descriptor(v_tile);
    mma_fence();
    multiply_values<ADD>(sums, p[0], p[1], p[2], p[3], b);
#pragma unroll
    for (int step = 1; step < 4; step++)
        multiply_values<true>(sums, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                              b + 2 * step);
    mma_commit();
}

struct Rows {  // of a thread: query rows g and g + 8 of its warp's 16
    float largest[2];  // running maximum, base 2
    float total[2];    // this thread's part of the normalizer
};

struct Keys {  // of a batch element
    int padding;   // the last key, which stands for
    float copies;  // so many of them, in base 2
};

// Scores of the last tile: the padding's copies are added, what is beyond them is taken out.
DEVICE void count_copies(float (&s)[32], int first, Keys keys, float scale, int lane) {
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = first + 8 * j + 2 * (lane & 3) + (i & 1);
            float &score = s[4 * j + i];
            score = fmaf(score, scale, key == keys.padding ? keys.copies : 0.0f);
            if (key > keys.padding) score = -__int_as_float(0x7F800000);
        }
}

// Scores become exponentials, rounded in pairs to the operand of P·v; `shrink` is what the old sums
// shrink by.
DEVICE void take_exponentials(float (&s)[32], u32 (&p)[16], float (&shrink)[2], Rows &rows,
                              float scale) {
    float top[2][2], sum[2][2] = {}, factor[2];
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float pair = fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]);
            top[r][j % 2] = j < 2 ? pair : fmaxf(pair, top[r][j % 2]);
        }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float row_top =
            fmaxf(rows.largest[r], quad_max(fmaxf(top[r][0], top[r][1])) * scale);
        shrink[r] = exp2_fast(rows.largest[r] - row_top);
        rows.largest[r] = row_top;
        factor[r] = scale;
        if (fabsf(row_top) > LARGEST_EXACT) {
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) s[4 * j + i] = __fmul_rn(s[4 * j + i], scale);
            factor[r] = 1.0f;
        }
    }
#pragma unroll
    for (int c = 0; c < 4; c++)  // 16 keys: columns 8·(2c) + 2t … and 8·(2c + 1) + 2t …
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float *const two = s + 8 * c + 4 * half + 2 * r;
                const float first = exp2_fast(fmaf(two[0], factor[r], -rows.largest[r]));
                const float second = exp2_fast(fmaf(two[1], factor[r], -rows.largest[r]));
                sum[r][0] += first, sum[r][1] += second;
                p[4 * c + 2 * half + r] = pack_bf16(first, second);
            }
#pragma unroll
    for (int r = 0; r < 2; r++)
        rows.total[r] = fmaf(rows.total[r], shrink[r], sum[r][0] + sum[r][1]);
}

struct Problem {
    int length, heads, batches, groups;  // groups of queries of a head
};

// A load that stays where it stands: its registers are in use before.
DEVICE Chunk load_here(const u16 *at) {
    Chunk x;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.pairs[0]), "=r"(x.pairs[1]), "=r"(x.pairs[2]), "=r"(x.pairs[3])
                 : "l"(at)
                 : "memory");
    return x;
}

DEVICE void load_queries(Chunk (&q)[2][4], const u16 *from, Strides strides, int group, int own_row,
                         int lane, const Problem &problem) {
    const int place = group / problem.groups;
    from += place / problem.heads * strides.batch + place % problem.heads * strides.head;
    const int row = (group - place * problem.groups) * (CONSUMERS * ROWS) + own_row;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const u16 *const own = from + min(row + 8 * r, problem.length - 1) * strides.token;
#pragma unroll
        for (int j = 0; j < 4; j++) q[r][j] = load_here(own + 32 * j + 8 * (lane & 3));
    }
}

// A thread's part of one row, divided by the row's total.
DEVICE void store_row(const float (&sums)[64], int r, float total, void *o, long long at,
                      float *o_scale, int lane, bool exists) {
    const float factor = 1.0f / quad_sum(total);
#if QUANTIZED
    float largest = 0.0f, scaling;
#pragma unroll
    for (int i = 0; i < 32; i++)
        largest = fmaxf(largest, fabsf(sums[i / 2 * 4 + 2 * r + i % 2]));
    const float step = e4m3_step(quad_max(largest) * factor, scaling);
    scaling *= factor;
    if (!exists) return;
#pragma unroll
    for (int a = 0; a < RUNS; a++) {
        Chunk chunk;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *const four = sums + 32 * a + 8 * i + 2 * r;
            chunk.pairs[i] = pack_e4m3(four[0] * scaling, four[1] * scaling, four[4] * scaling,
                                       four[5] * scaling);
        }
        *(Chunk *)((char *)o + at + 4 * RUN * a + RUN * (lane & 3)) = chunk;
    }
    if ((lane & 3) == 0) *o_scale = step;
#else
    if (!exists) return;
#pragma unroll
    for (int a = 0; a < RUNS; a++) {
        Chunk chunk;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *const two = sums + 16 * a + 4 * i + 2 * r;
            chunk.pairs[i] = pack_bf16(two[0] * factor, two[1] * factor);
        }
        *(Chunk *)((u16 *)o + at + 4 * RUN * a + RUN * (lane & 3)) = chunk;
    }
#endif
}

struct Slots {  // which one is next, and the parity of the round
    int slot = 0;
    u32 parity = 0;

    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend_padded(
    const u16 *q, Strides q_strides,  // (B, H, L, 128) bf16
    const char *tiles,                // as arrange_tiles writes them, `most` to a head
    const int *start,                 // (B)
    void *o, Strides o_strides,       // (B, H, L, 128) bf16; e4m3 if QUANTIZED
    float *o_scale,                   // (B·L, H) with strides (1, B·L), if QUANTIZED
    int length, int keys, int most, int heads, int batches, float scale) {
    extern __shared__ __align__(1024) char memory[];
    __shared__ u64 barriers[2 * STAGES];
    const int thread = threadIdx.x, lane = thread & 31;
    const int warpgroup = __shfl_sync(0xffffffffu, thread / 128, 0);  // known to be one for a warp
    const u32 slots_at = (shared_address(memory) + 1023) & ~1023u;
    const u32 filled = shared_address(barriers), read = filled + 8 * STAGES;
    const Problem problem = {length, heads, batches,
                             (length + CONSUMERS * ROWS - 1) / (CONSUMERS * ROWS)};
    const long long groups = (long long)batches * heads * problem.groups;
    const int first = groups * blockIdx.x / gridDim.x, end = groups * (blockIdx.x + 1) / gridDim.x;
    int last = 0;  // key of any batch element
    for (int b = 0; b < batches; b++) last = max(last, start[b]);
    const int count = last / KEYS + 1;
    const bool stay = count <= STAGES;

    if (thread == 0) {
        for (int slot = 0; slot < STAGES; slot++) {
            barrier_init(filled + 8 * slot, 1);
            barrier_init(read + 8 * slot, CONSUMERS * 4);
        }
        barriers_are_initialized();
    }
    __syncthreads();

    Slots slots;
    if (warpgroup == CONSUMERS) {
        give_registers<COPYING_REGISTERS>();
        if (thread == CONSUMERS * 128) {
            int there = -1;
            for (int group = first; group < end; group++) {
                const int place = group / problem.groups;
                if (stay && place == there) continue;
                there = place;
                const char *const own = tiles + (long long)place * most * TILE_BYTES;
                for (int j = 0; j < count; j++) {
                    const u32 slot = 8 * slots.slot;
                    barrier_wait(read + slot, slots.parity ^ 1);
                    copy_tile(slots_at + slots.slot * TILE_BYTES, own + j * TILE_BYTES, TILE_BYTES,
                              filled + slot);
                    slots.advance();
                }
            }
        }
        __syncwarp();
        return;
    }

    take_registers<MULTIPLYING_REGISTERS>();
    const int own_row = warpgroup * ROWS + thread % 128 / 32 * 16 + lane / 4;
    Chunk queries[2][4];
    if (first < end) load_queries(queries, q, q_strides, first, own_row, lane, problem);
    for (int group = first; group < end; group++) {
        const int place = group / problem.groups, batch = place / heads, head = place % heads;
        const bool leaves = !stay || group + 1 == end || (group + 1) / problem.groups != place;
        const Keys own = {start[batch], log2f(keys - start[batch])};
        const Slots from = slots;
        Rows rows;
#pragma unroll
        for (int r = 0; r < 2; r++)
            rows.largest[r] = -__int_as_float(0x7F800000), rows.total[r] = 0.0f;
        float sums[64], s[32], shrink[2];
        u32 p[16];
        for (int j = 0; j < count; j++) {
            const u32 tile = slots_at + slots.slot * TILE_BYTES;
            barrier_wait(filled + 8 * slots.slot, slots.parity);
            start_scores(s, queries, tile);
            mma_wait<0>();
#pragma unroll
            for (int i = 0; i < 32; i++) asm volatile("" : "+f"(s[i]));
            if (j == count - 1 && group + 1 < end)
                load_queries(queries, q, q_strides, group + 1, own_row, lane, problem);
            float factor = scale;
            if ((j + 1) * KEYS > own.padding || scale <= 0.0f) {
                count_copies(s, j * KEYS, own, scale, lane);
                factor = 1.0f;
            }
            take_exponentials(s, p, shrink, rows, factor);
            if (j == 0) {
                start_output<false>(sums, p, tile + K_BYTES);
            } else {
#pragma unroll
                for (int i = 0; i < 64; i++) sums[i] *= shrink[(i >> 1) & 1];
                start_output<true>(sums, p, tile + K_BYTES);
            }
            mma_wait<0>();
#pragma unroll
            for (int i = 0; i < 64; i++) asm volatile("" : "+f"(sums[i]));
            if (leaves && lane == 0) barrier_arrive(read + 8 * slots.slot);
            slots.advance();
        }
        if (!leaves) slots = from;

        const int row = (group - place * problem.groups) * (CONSUMERS * ROWS) + own_row;
        const long long all_rows = (long long)batches * length;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const long long token = row + 8 * r;
            const long long at =
                batch * o_strides.batch + head * o_strides.head + token * o_strides.token;
            store_row(sums, r, rows.total[r], o, at,
                      o_scale + head * all_rows + (long long)batch * length + token, lane,
                      token < length);
        }
    }
}
