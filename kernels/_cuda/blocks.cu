// Add a gated branch to rows, normalize and modulate them and store them in int8, each value read and
// written once, with a scale for a block of 128 rows and 128 channels.
//
//     x' = x + branch · gate
//     y = (x' − mean) · rstd · (OFFSET + gain) + bias
//
// A thread has all of its program's rows, so gain and bias are read once. y takes the place of the rows,
// in 16 bits with 11 digits, until the programs have told each other the largest magnitudes. Where gain
// and bias differ from row to row, nothing bounds y beforehand: it is computed twice, in 32 bits.
//
// The rows of the cluster's next block are copied to where a row was stored from, and to where KEEP
// rows were as soon as their y is in registers. Without a branch PART rows are normalized while others
// arrive; of a branch AHEAD rows are on their way at once. Clusters begin one after the other, STAGGER
// cycles from the first to the last: else all copy at a time and all compute at a time.
//
// CHANNELS is a multiple of 256 up to 6144. BRANCH, GATE, GAIN and BIAS say which of them there are;
// without GAIN, OFFSET + gain is 1. PER_TOKEN: these parameters are not the same for all rows. BATCHED:
// there are several batch entries. PROGRAMS share a multiprocessor at least. SHARED_BYTES is what the
// host takes `Shared` to be.
//
// In the last block, rows behind the last change no maximum and are not stored.

constexpr int UNROLL = 4;  // rows at once

struct Shared {
    Rows rows;
    Sums sums;
    float2 norms[HELD];  // rstd, −mean · rstd
    Largest largest[2];
    u64 told[2];  // barriers: all programs have told theirs
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host gives another size");

DEVICE Chunk &own_channels(Shared &shared, int row) {
    return *(Chunk *)&shared.rows[row][16 * threadIdx.x];
}

// (x' − mean) · rstd of the thread's channels of a held row.
DEVICE void normalize(float (&values)[8], Shared &shared, int row) {
    unpack(own_channels(shared, row), values);
    const float2 norm = shared.norms[row];
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = fmaf(values[i], norm.x, norm.y);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, PROGRAMS)
    quantize_blocks(
        const u16 *__restrict__ x,           // (B, L, C), strides (x_batch, x_row, 1)
        const u16 *__restrict__ branch,      // as x, or null
        const Parameter *__restrict__ gate,  // broadcast to (B, L, C), strides (gate_batch, gate_row,
                                             // 1), or null
        const Parameter *__restrict__ gain,  // as gate
        const Parameter *__restrict__ bias,  // as gate
        u16 *__restrict__ stream,            // (B, L, C): x', or null
        u8 *__restrict__ y,                  // (B, L, C)
        float *__restrict__ y_scale,         // (⌈B·L / 128⌉, C / 128)
        float eps, int batches, int length,
        long long x_batch, long long x_row, long long branch_batch, long long branch_row,
        long long gate_batch, long long gate_row, long long gain_batch, long long gain_row,
        long long bias_batch, long long bias_row) {
    extern __shared__ __align__(128) u8 memory[];
    Shared &shared = *(Shared *)memory;
    const int rank = cluster_rank(), group = threadIdx.x / 16;
    const int rows = batches * length, blocks = (rows + 127) / 128, clusters = gridDim.x / CLUSTER;
    const int channel = 8 * threadIdx.x;
    x += channel, branch += channel, gate += channel, gain += channel, bias += channel;
    stream += channel, y += channel;

    if (threadIdx.x == 0) {
        barrier_init(shared_address(&shared.told[0]), 1);
        barrier_init(shared_address(&shared.told[1]), 1);
        barriers_are_initialized();
    }
    cluster_arrive();
    const auto copy_row = [&](const u16 *&next, int first, int r) {
        copy_chunk(shared_address(&own_channels(shared, r)),
                   row_at(x, next, first + r, length, x_batch, x_row), first + r < rows);
        if (r == 7 || r == 15) commit_copies();
    };
    const auto load_modulation = [&](int row, float (&factor)[8], float (&shift)[8]) {
#if GAIN
        load_parameter(row_at(gain, row, length, gain_batch, gain_row), factor);
#endif
#pragma unroll
        for (int i = 0; i < 8; i++) factor[i] = GAIN ? factor[i] + OFFSET : 1.0f;
#if BIAS
        load_parameter(row_at(bias, row, length, bias_batch, bias_row), shift);
#endif
    };
    int block = blockIdx.x / CLUSTER;
    if (blocks > 2 * clusters) wait_cycles(STAGGER / clusters * block);
    const u16 *next = x + (128 * block + HELD * rank) * x_row;
#pragma unroll
    for (int r = 0; r < HELD; r++) copy_row(next, 128 * block + HELD * rank, r);
    float factor[8], shift[8] = {};
#if !PER_TOKEN
    load_modulation(0, factor, shift);
    const float down = shrink(factor, shift);
    const Chunk factors = pack_halves(factor), shifts = pack_halves(shift);
#endif
    cluster_wait();

    for (int turn = 0; block < blocks; turn++, block += clusters) {
        const int first = 128 * block + HELD * rank, first_of_next = first + 128 * clusters;
        const int here = rows - first;  // so many of the held rows exist, if not all or none do
        const bool more = block + clusters < blocks;
        next = x + first_of_next * x_row;
#if BRANCH
        float weight[8];
#if GATE && !PER_TOKEN
        load_parameter(gate, weight);
#endif
        const u16 *branch_next = branch + first * branch_row;
        u16 *const sums = stream + (long long)first * CHANNELS;
        Chunk added[AHEAD];
        const auto load_added = [&](int r) {
            const u16 *at =
                row_at(branch, branch_next, first + r, length, branch_batch, branch_row);
            added[r % AHEAD] = load_chunk_here(at, r < here);
        };
#pragma unroll
        for (int r = 0; r < AHEAD; r++) load_added(r);
        wait_copies<0>();
#pragma unroll
        for (int r = 0; r < HELD; r++) {
            float values[8], addend[8];
            unpack(own_channels(shared, r), values);
            unpack(added[r % AHEAD], addend);
#if GATE && PER_TOKEN
            load_parameter(row_at(gate, min(first + r, rows - 1), length, gate_batch, gate_row), weight);
#endif
#pragma unroll
            for (int i = 0; i < 8; i++)
                values[i] = GATE ? fmaf(addend[i], weight[i], values[i]) : values[i] + addend[i];
            const Chunk sum = pack(values);
            own_channels(shared, r) = sum;
            if (r < here) *(Chunk *)(sums + r * CHANNELS) = sum;
            if (r + AHEAD < HELD) load_added(r + AHEAD);
        }
#endif
#if PER_TOKEN
        const auto modulated = [&](float (&values)[8], int r) {
            load_modulation(min(first + r, rows - 1), factor, shift);
            normalize(values, shared, r);
#pragma unroll
            for (int i = 0; i < 8; i++) values[i] = fmaf(values[i], factor[i], shift[i]);
        };
        float largest = 0.0f;
#else
        Chunk kept[KEEP + 1], magnitudes = {};
        const auto modulated = [&](int r) {
            float values[8];
            normalize(values, shared, r);
            const Chunk halves = fma_of_halves(pack_halves(values), factors, shifts);
            magnitudes = larger_of_halves(magnitudes, halves);
            return halves;
        };
#endif
#pragma unroll
        for (int from = 0; from < HELD; from += PART) {
#pragma unroll
            for (int r = from; r < from + PART; r += 8) {
                if (!BRANCH && r == 0) wait_copies<1>();
                if (!BRANCH && r == 8) wait_copies<0>();
                __syncwarp();
                sum_channels(shared.rows, r, shared.sums);
            }
            __syncthreads();
            measure(shared.rows, shared.sums, shared.norms, eps, from, here);
            __syncthreads();
#if PER_TOKEN
#pragma unroll UNROLL
            for (int r = from; r < from + PART; r++) {
                float values[8];
                modulated(values, r);
                largest = largest_of(values, largest);
            }
#else
            if (from == 0) {
#pragma unroll
                for (int r = 0; r < KEEP; r++) kept[r] = modulated(r);
#pragma unroll
                for (int r = 0; r < KEEP; r++)
                    if (more) copy_row(next, first_of_next, r);
            }
#pragma unroll UNROLL
            for (int r = from == 0 ? KEEP : from; r < from + PART; r++)
                own_channels(shared, r) = modulated(r);
#endif
        }
#if PER_TOKEN
        float scaling;
#else
        const float largest = largest_half(magnitudes);
        u32 scaling;
#endif
        const float largest_of_all =
            largest_of_programs(largest, shared.largest, shared.told, turn, rank, group);
#if PER_TOKEN
        const float step = int8_step(largest_of_all, scaling);
#else
        const float step = int8_step(largest_of_all, down, scaling);
#endif
        if (rank == 0 && threadIdx.x % 16 == 0) y_scale[(long long)block * GROUPS + group] = step;

        u8 *to = y + (long long)first * CHANNELS;
        const auto store = [&](uint2 packed, int r) {
            // Else all of this would go where it is needed: behind the store of the row before.
            asm volatile("" : "+r"(packed.x), "+r"(packed.y));
            if (r < here) *(uint2 *)to = packed;
            to += CHANNELS;
        };
#if !PER_TOKEN
#pragma unroll
        for (int r = 0; r < KEEP; r++) store(pack_int8(kept[r], scaling), r);
#endif
#pragma unroll 1
        for (int from = PER_TOKEN ? 0 : KEEP; from < HELD; from += UNROLL) {
#pragma unroll
            for (int r = from; r < from + UNROLL; r++) {
#if PER_TOKEN
                float values[8];
                modulated(values, r);
#else
                const Chunk values = own_channels(shared, r);
#endif
                store(pack_int8(values, scaling), r);
            }
            if (more)
#pragma unroll
                for (int r = from; r < from + UNROLL; r++) copy_row(next, first_of_next, r);
        }
    }
}
