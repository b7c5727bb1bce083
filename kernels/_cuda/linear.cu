// A linear layer on e4m3 operands with block scales, and what follows it, for Hopper (sm_90a).
//
//     y = (q · q_scale) · (weight · weight_scale)ᵀ + bias
//     EPILOGUE 0   y                    as bf16
//     EPILOGUE 1   gelu_tanh(y)         as e4m3 with a scale for each row and 128 features
//     EPILOGUE 2   x + y · gate         as bf16; without a gate x + y
//
// BIAS and GATE are 0 for none, 1 for float, 2 for bf16; GATE_PER_ROW is 0 where one serves all rows.
//
// A tile is ROWS rows by 128 features, one group of the quantized result. CONSUMERS warpgroups
// multiply, each HALVES · 64 rows; one more brings tiles of 128 along K into STAGES slots. Tensor
// cores keep few bits of an fp8 sum, so each 128 of K is summed apart (64 registers) and then added,
// scaled, to the sums in float32 (HALVES · 64 registers). While one warpgroup adds, another
// multiplies; while one finishes a tile, another may be as far ahead as there are slots.
//
// Programs of a cluster take neighbouring columns of one row of tiles: each brings its share of the
// rows of q for all of them. A slot is free again when every warp of the cluster has read it.
//
// A thread of a warpgroup holds columns 8j + 2t and 8j + 2t + 1 of a product (t: its lane modulo 4).
// Rows of the weight lie in shared memory in such an order that these are RUN neighbouring features:
// row 4·RUN·a + 8i + 2t + e holds feature 4·RUN·a + RUN·t + 2i + e. So results are stored from
// registers, 16 bytes a time, whole sectors by each four lanes.
//
// Barriers of a slot: `filled` (one arrival, of the copying thread, and its bytes) and `read` (one
// arrival of each consumer warp of the cluster). In the r-th round over the slots the copying thread
// waits for the (r − 1)-th phase of `read`, consumers for the r-th of `filled`. No thread waits for
// a phase more than one behind the current one: nothing is copied into a slot before every warp has
// left it, and a warp's next wait on it follows its own arrival.

#ifndef CLUSTER
#define CLUSTER 2
#endif
#ifndef CONSUMERS
#define CONSUMERS 2
#endif
#ifndef HALVES
#define HALVES 2
#endif
#ifndef STAGES
#define STAGES 4
#endif

constexpr int SIDE = 128, ROWS = CONSUMERS * HALVES * 64;
constexpr int THREADS = (CONSUMERS + 1) * 128;
constexpr int ROWS_PER_BAND = 8;  // of tiles whose columns are walked together
constexpr u32 HALF_BYTES = 64 * SIDE, Q_BYTES = ROWS * SIDE, WEIGHT_BYTES = SIDE * SIDE;
constexpr u32 STAGE_BYTES = Q_BYTES + WEIGHT_BYTES, SHARE_BYTES = Q_BYTES / CLUSTER;
constexpr int SHARE_ROWS = ROWS / CLUSTER;
// What is granted at the start, then moved from the warpgroup that copies to those that multiply.
constexpr int GRANTED = 65536 / THREADS / 8 * 8;
constexpr int COPYING_REGISTERS = CONSUMERS == 2 ? 24 : 32;
constexpr int MULTIPLYING_REGISTERS = GRANTED + (GRANTED - COPYING_REGISTERS) / CONSUMERS / 8 * 8;
static_assert(MULTIPLYING_REGISTERS <= 240, "beyond, fewer are left to copy with");
static_assert(COPYING_REGISTERS + CONSUMERS * MULTIPLYING_REGISTERS <= (CONSUMERS + 1) * GRANTED,
              "a warpgroup would wait for registers for ever");
constexpr int RUN = EPILOGUE == 1 ? 16 : 8;  // 16 bytes of the result
constexpr int RUNS = 32 / RUN;               // of a thread in a row of a tile

// d (64×128, float) = or += a (64×32 e4m3, shared) · b (128×32 e4m3, shared)ᵀ
template <bool ADD> DEVICE void multiply_e4m3(float (&d)[64], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
        NAMES64 ", %64, %65, %66, 1, 1;"
        : R64("+f")
        : "l"(a), "l"(b), "n"(ADD));
}

struct Tile {
    int row, column;
};

// Bands of rows, within them column by column: neighbours in time share cache. `columns` counts
// those of a cluster.
DEVICE Tile tile_at(int index, int rows, int columns) {
    const int band = index / (ROWS_PER_BAND * columns), first = band * ROWS_PER_BAND;
    const int height = min(rows - first, ROWS_PER_BAND);
    const int within = index - first * columns, column = within / height;
    return {first + within - column * height, column};
}

struct Slots {  // which one is next, and the parity of the round
    int slot = 0;
    u32 parity = 0;

    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

struct Problem {
    int rows, features, blocks;  // M, N, K / 128
    int row_tiles, column_tiles, tiles;  // in the steps of a cluster

    __device__ __forceinline__ Problem(int rows, int features, int blocks)
        : rows(rows), features(features), blocks(blocks) {
        row_tiles = (rows + ROWS - 1) / ROWS;
        column_tiles = (features + SIDE * CLUSTER - 1) / (SIDE * CLUSTER);
        tiles = row_tiles * column_tiles;
    }
};

// The scales of one tile and block of K: of rows g and g + 8 of each half, and of the weight.
struct Scales {
    float rows[HALVES][2], weight;
};

// Reads scales one block of K ahead, beyond the end of a tile those of the next.
struct ScaleReader {
    const float *q_scale, *weight_scale;
    int own_row, rank, index, block = 0;
    u32 rows[HALVES][2];
    int weight_row;

    __device__ __forceinline__ void place(const Problem &problem) {
        const Tile tile = tile_at(min(index, problem.tiles - 1), problem.row_tiles,
                                  problem.column_tiles);
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int r = 0; r < 2; r++)  // those after the last are zero in the product
                rows[h][r] = min(tile.row * ROWS + own_row + 64 * h + 8 * r, problem.rows - 1);
        weight_row = min(tile.column * CLUSTER + rank, problem.features / SIDE - 1);
    }

    __device__ __forceinline__ Scales next(const Problem &problem, int step) {
        Scales scales;
        const u32 column = block * problem.rows;
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int r = 0; r < 2; r++) scales.rows[h][r] = __ldg(q_scale + (column + rows[h][r]));
        scales.weight = __ldg(weight_scale + weight_row * problem.blocks + block);
        if (++block == problem.blocks) {
            block = 0;
            index += step;
            place(problem);
        }
        return scales;
    }
};

DEVICE void start_products(float (&part)[64], u64 a, u64 b) {
    mma_fence();
    multiply_e4m3<false>(part, a, b);
#pragma unroll
    for (int step = 1; step < 4; step++) multiply_e4m3<true>(part, a + 2 * step, b + 2 * step);
    mma_commit();
}

template <int KIND> struct Parameter {
    typedef float Value;
};
template <> struct Parameter<2> {
    typedef u16 Value;
};
typedef Parameter<BIAS>::Value BiasValue;
typedef Parameter<GATE>::Value GateValue;

// A parameter of 8 neighbouring features; 0 where there is none.
template <int KIND>
DEVICE void load_parameter(const typename Parameter<KIND>::Value *pointer, float (&values)[8]) {
    if constexpr (KIND == 2) {
        unpack(*(const Chunk *)pointer, values);
    } else if constexpr (KIND == 1) {
        const float4 low = ((const float4 *)pointer)[0], high = ((const float4 *)pointer)[1];
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = 0.0f;
    }
}

struct Output {
    void *y;         // (M, N) bf16, or e4m3
    float *y_scale;  // (M, N / 128) with strides (1, M)
    const u16 *x;    // (M, N) bf16
    const GateValue *gate;
    long long gate_batch, gate_row;  // strides
    int length;                      // rows of a batch
};

// One row of a thread: its values of a tile, run after run.
DEVICE void store_row(const Output &output, const Problem &problem, float (&values)[32], int row,
                      int feature, int lane) {
    const long long at = (long long)row * problem.features + feature;
#if EPILOGUE == 1
    float largest = 0.0f, factor;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        values[i] = gelu(values[i]);
        largest = fmaxf(largest, fabsf(values[i]));
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const float step = e4m3_step(largest, factor);
    if (row >= problem.rows) return;
#pragma unroll
    for (int a = 0; a < RUNS; a++) {
        Chunk chunk;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *four = values + RUN * a + 4 * i;
            chunk.pairs[i] = pack_e4m3(four[0] * factor, four[1] * factor, four[2] * factor,
                                       four[3] * factor);
        }
        *(Chunk *)((char *)output.y + at + 4 * RUN * a) = chunk;
    }
    if ((lane & 3) == 0) output.y_scale[(long long)(feature / SIDE) * problem.rows + row] = step;
#else
    if (row >= problem.rows) return;
#pragma unroll
    for (int a = 0; a < RUNS; a++) {
        float run[8];
#pragma unroll
        for (int i = 0; i < 8; i++) run[i] = values[RUN * a + i];
        *(Chunk *)((u16 *)output.y + at + 4 * RUN * a) = pack(run);
    }
#endif
}

// A thread's rows of a tile, added to the stream. All of x is asked for first, into the registers
// of a product, which are free by then; bias and gate are applied while it is on its way, and no
// load waits for a store.
DEVICE void add_to_stream(const Output &output, const Problem &problem, const BiasValue *bias,
                          float (&sums)[HALVES][64], int first_row, int feature) {
    Chunk x[HALVES][2][RUNS];
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = min(first_row + 64 * h + 8 * r, problem.rows - 1);
            const u16 *source = output.x + (long long)row * problem.features + feature;
#pragma unroll
            for (int a = 0; a < RUNS; a++) x[h][r][a] = *(const Chunk *)(source + 4 * RUN * a);
        }
#pragma unroll
    for (int a = 0; a < RUNS; a++) {
        float added[8], gate[8];
        const int run = feature + 4 * RUN * a;
        load_parameter<BIAS>(bias + run, added);
        if (GATE && !GATE_PER_ROW) load_parameter<GATE>(output.gate + run, gate);
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (GATE_PER_ROW) {
                    const int row = min(first_row + 64 * h + 8 * r, problem.rows - 1);
                    const int batch = row / output.length, token = row - batch * output.length;
                    const GateValue *own = output.gate + batch * output.gate_batch +
                                           token * output.gate_row;
                    load_parameter<GATE>(own + run, gate);
                }
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    float &sum = sums[h][(RUN * a + i) / 2 * 4 + 2 * r + i % 2];
                    sum += added[i];
                    if (GATE) sum *= gate[i];
                }
            }
    }
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = first_row + 64 * h + 8 * r;
            if (row >= problem.rows) continue;
            u16 *target = (u16 *)output.y + (long long)row * problem.features + feature;
#pragma unroll
            for (int a = 0; a < RUNS; a++) {
                float values[8];
                unpack(x[h][r][a], values);
#pragma unroll
                for (int i = 0; i < 8; i++)
                    values[i] += sums[h][(RUN * a + i) / 2 * 4 + 2 * r + i % 2];
                *(Chunk *)(target + 4 * RUN * a) = pack(values);
            }
        }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) linear(
    const __grid_constant__ TensorMap q_map,       // q (M, K), boxes of SHARE_ROWS × 128
    const __grid_constant__ TensorMap weight_map,  // weight (N, K), boxes of 128 × 128, reordered
    const float *q_scale,                          // (M, K / 128) with strides (1, M)
    const float *weight_scale,                     // (N / 128, K / 128)
    const BiasValue *bias,                         // (N), or null
    void *y,                                       // (M, N) bf16; or e4m3 …
    float *y_scale,                                // … with (M, N / 128), strides (1, M)
    const u16 *x,                                  // (M, N) bf16
    const GateValue *gate,                         // (M / length, length, N), of these strides
    long long gate_batch, long long gate_row, int length,
    int rows, int features, int blocks) {
    extern __shared__ __align__(1024) char memory[];
    __shared__ u64 barriers[2 * STAGES];
    const int thread = threadIdx.x, lane = thread & 31;
    const int group = __shfl_sync(0xffffffffu, thread / 128, 0);  // known to be one for a warp
    const u32 rank = CLUSTER == 1 ? 0 : cluster_rank();
    const u32 tiles = (shared_address(memory) + 1023) & ~1023u;
    const u32 filled = shared_address(barriers), read = filled + 8 * STAGES;
    const Problem problem(rows, features, blocks);
    const int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;

    if (thread == 0) {
        for (int slot = 0; slot < STAGES; slot++) {
            barrier_init(filled + 8 * slot, 1);
            barrier_init(read + 8 * slot, CLUSTER * CONSUMERS * 4);
        }
        barriers_are_initialized();
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_sync();

    if (group == CONSUMERS) {
        give_registers<COPYING_REGISTERS>();
        if (thread == CONSUMERS * 128) {
            prefetch_map(q_map);
            prefetch_map(weight_map);
            Slots slots;
            for (int index = first; index < problem.tiles; index += step) {
                const Tile tile = tile_at(index, problem.row_tiles, problem.column_tiles);
                const int row = tile.row * ROWS + rank * SHARE_ROWS;
                const int column = (tile.column * CLUSTER + rank) * RUNS;
                for (int block = 0; block < blocks; block++) {
                    const u32 target = tiles + slots.slot * STAGE_BYTES;
                    const u32 barrier = filled + 8 * slots.slot;
                    barrier_wait(read + 8 * slots.slot, slots.parity ^ 1);
                    barrier_expect(barrier, STAGE_BYTES);
                    if (CLUSTER > 1) {
                        copy_box(target + rank * SHARE_BYTES, q_map, block * SIDE, row, barrier,
                                 (1 << CLUSTER) - 1);
                    } else {
                        copy_box(target, q_map, block * SIDE, row, barrier);
                    }
                    copy_box_5d(target + Q_BYTES, weight_map, block * SIDE, column, barrier);
                    slots.advance();
                }
            }
        }
        __syncwarp();
    } else {
        take_registers<MULTIPLYING_REGISTERS>();
        const int own_row = group * HALVES * 64 + thread % 128 / 32 * 16 + lane / 4;
        const u64 q = descriptor(tiles + group * HALVES * HALF_BYTES);
        const u64 weight = descriptor(tiles + Q_BYTES);
        const Output output = {y, y_scale, x, gate, gate_batch, gate_row, length};
        ScaleReader reader = {q_scale, weight_scale, own_row, (int)rank, first};
        reader.place(problem);
        Scales scales = reader.next(problem, step);
        Slots slots;
        float part[64];
#pragma unroll
        for (int i = 0; i < 64; i++) part[i] = 0.0f;
        for (int index = first; index < problem.tiles; index += step) {
            float sums[HALVES][64];
#pragma unroll
            for (int h = 0; h < HALVES; h++)
#pragma unroll
                for (int i = 0; i < 64; i++) sums[h][i] = 0.0f;
            for (int block = 0; block < blocks; block++) {
                const u32 slot = slots.slot * (STAGE_BYTES >> 4);  // as descriptors count
                Scales ahead;
                barrier_wait(filled + 8 * slots.slot, slots.parity);
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    start_products(part, q + slot + h * (HALF_BYTES >> 4), weight + slot);
                    if (h == 0) ahead = reader.next(problem, step);
                    mma_wait<0>();
                    if (h == HALVES - 1 && lane < CLUSTER)
                        barrier_arrive(read + 8 * slots.slot, lane);
                    const float factor[2] = {scales.rows[h][0] * scales.weight,
                                             scales.rows[h][1] * scales.weight};
#pragma unroll
                    for (int i = 0; i < 64; i++)
                        sums[h][i] = fmaf(part[i], factor[(i >> 1) & 1], sums[h][i]);
                }
                scales = ahead;
                slots.advance();
            }

            const Tile tile = tile_at(index, problem.row_tiles, problem.column_tiles);
            const int row = tile.row * ROWS + own_row;
            const int start = (tile.column * CLUSTER + rank) * SIDE;
            const int feature = start + RUN * (lane & 3);
            if (start >= features) continue;  // beyond the last, of an odd number of columns
#if EPILOGUE == 2
            add_to_stream(output, problem, bias, sums, row, feature);
#else
            float added[4][8];
#pragma unroll
            for (int i = 0; i < 4; i++)
                load_parameter<BIAS>(bias + feature + 4 * (8 * i / RUN * RUN) + 8 * i % RUN,
                                     added[i]);
#pragma unroll
            for (int h = 0; h < HALVES; h++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float values[32];
#pragma unroll
                    for (int i = 0; i < 32; i++)
                        values[i] = sums[h][i / 2 * 4 + 2 * r + i % 2] + added[i / 8][i % 8];
                    store_row(output, problem, values, row + 64 * h + 8 * r, feature, lane);
                }
#endif
        }
    }
    if (CLUSTER > 1) cluster_sync();  // no program ends while another still arrives or copies here
}
