// Add a gated branch to rows, normalize and modulate them and store them in int8, each value read and
// written once, with a scale for a block of 128 rows and 128 channels.
//
//     x' = x + branch · gate
//     y = (x' − mean) · rstd · (OFFSET + gain) + bias
//
// A thread has all of its program's rows, so gain and bias are read once. y is computed twice: for the
// largest magnitudes, which the programs tell each other, and for the result. While that is stored, the
// rows of the cluster's next block are copied to where they were.
//
// CHANNELS is a multiple of 256 up to 6144. BRANCH, GATE, GAIN and BIAS say which of them there are;
// without GAIN, OFFSET + gain is 1. PER_TOKEN: these parameters are not the same for all rows. BATCHED:
// there are several batch entries. PROGRAMS share a multiprocessor at least; STEP rows of the branch
// are loaded at once, UNROLL rows normalized. PREFETCH: while a block is in work, memory brings x of the
// next to L2. SHARED_BYTES is what the host takes `Shared` to be.
//
// In the last block, rows behind the last change no maximum and are not stored.

struct Shared {
    Rows rows;
    Sums sums;
    float2 norms[HELD];  // rstd, −mean · rstd
    Largest largest[2];
    u64 told[2];  // barriers: all programs have told theirs
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host gives another size");

// y of the thread's channels of a held row.
DEVICE void normalize(float (&values)[8], const Shared &shared, int row, const float (&factor)[8],
                      const float (&shift)[8]) {
    unpack(*(const Chunk *)&shared.rows[row][16 * threadIdx.x], values);
    const float2 norm = shared.norms[row];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        values[i] = fmaf(values[i], norm.x, norm.y);
        values[i] = GAIN ? fmaf(values[i], factor[i], shift[i]) : values[i] + shift[i];
    }
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
    const auto copy_row = [&](const u16 *&next, int row, int r) {
        copy_chunk(shared_address(&shared.rows[r][2 * channel]),
                   row_at(x, next, row, length, x_batch, x_row), row < rows);
    };
    const auto load_modulation = [&](int row, float (&factor)[8], float (&shift)[8]) {
#if GAIN
        load_parameter(row_at(gain, row, length, gain_batch, gain_row), factor);
#pragma unroll
        for (int i = 0; i < 8; i++) factor[i] += OFFSET;
#endif
#if BIAS
        load_parameter(row_at(bias, row, length, bias_batch, bias_row), shift);
#endif
    };
    int block = blockIdx.x / CLUSTER;
    const u16 *next = x + (128 * block + HELD * rank) * x_row;
#pragma unroll
    for (int r = 0; r < HELD; r++) copy_row(next, 128 * block + HELD * rank + r, r);
    commit_copies();
    float factor[8] = {}, shift[8] = {};
#if !PER_TOKEN
    load_modulation(0, factor, shift);
#endif
    cluster_wait();

    for (int turn = 0; block < blocks; turn++, block += clusters) {
        const int first = 128 * block + HELD * rank;
        const int here = rows - first;  // so many of the held rows exist, if not all or none do
#if BRANCH
        float weight[8];
#if GATE && !PER_TOKEN
        load_parameter(gate, weight);
#endif
        const u16 *branch_next = branch + first * branch_row;
        u16 *const sums = stream + (long long)first * CHANNELS;
#pragma unroll
        for (int from = 0; from < HELD; from += STEP) {
            Chunk added[STEP] = {};
#pragma unroll
            for (int r = 0; r < STEP; r++) {
                const u16 *at = row_at(branch, branch_next, first + from + r, length, branch_batch,
                                       branch_row);
                if (from + r < here) added[r] = *(const Chunk *)at;
            }
            if (from == 0) wait_copies<0>();
#pragma unroll
            for (int r = from; r < from + STEP; r++) {
                Chunk &held = *(Chunk *)&shared.rows[r][2 * channel];
                float values[8], addend[8];
                unpack(held, values);
                unpack(added[r - from], addend);
#if GATE && PER_TOKEN
                load_parameter(row_at(gate, min(first + r, rows - 1), length, gate_batch, gate_row),
                               weight);
#endif
#pragma unroll
                for (int i = 0; i < 8; i++)
                    values[i] = GATE ? fmaf(addend[i], weight[i], values[i]) : values[i] + addend[i];
                const Chunk sum = pack(values);
                held = sum;
                if (r < here) *(Chunk *)(sums + r * CHANNELS) = sum;
            }
        }
#else
        wait_copies<0>();
#endif
#if PREFETCH
        prefetch_rows(first + 128 * clusters, rows, [&](int row) {
            return row_at(x - channel, row, length, x_batch, x_row);
        });
#endif
        __syncwarp();
        sum_channels(shared.rows, 0, shared.sums);
        sum_channels(shared.rows, 8, shared.sums);
        __syncthreads();
        measure(shared.rows, shared.sums, shared.norms, eps, here);
        __syncthreads();

        float largest = 0.0f;
#pragma unroll UNROLL
        for (int r = 0; r < HELD; r++) {
#if PER_TOKEN
            load_modulation(min(first + r, rows - 1), factor, shift);
#endif
            float values[8];
            normalize(values, shared, r, factor, shift);
            largest = largest_of(values, largest);
        }
        largest = largest_of_programs(largest, shared.largest, shared.told, turn, rank, group);
        float scaling;
        const float step = int8_step(largest, scaling);
        if (rank == 0 && threadIdx.x % 16 == 0) y_scale[(long long)block * GROUPS + group] = step;

        const bool more = block + clusters < blocks;
        u8 *to = y + (long long)first * CHANNELS;
        next = x + (first + 128 * clusters) * x_row;
#pragma unroll 1
        for (int from = 0; from < HELD; from += UNROLL) {
#pragma unroll
            for (int r = 0; r < UNROLL; r++) {
#if PER_TOKEN
                load_modulation(min(first + from + r, rows - 1), factor, shift);
#endif
                float values[8];
                normalize(values, shared, from + r, factor, shift);
                uint2 packed = pack_int8(values, scaling);
                // Else all of this would go where it is needed: behind the store of the row before.
                asm volatile("" : "+r"(packed.x), "+r"(packed.y));
                if (from + r < here) *(uint2 *)(to + r * CHANNELS) = packed;
            }
            if (more)
#pragma unroll
                for (int r = 0; r < UNROLL; r++)
                    copy_row(next, first + 128 * clusters + from + r, from + r);
            to += UNROLL * CHANNELS;
        }
        commit_copies();
    }
}
