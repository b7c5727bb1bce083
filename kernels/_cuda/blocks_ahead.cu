// Normalize and modulate rows and store them in int8, each value read and written once, with a scale
// for a block of 128 rows and 128 channels.
//
//     y = (x − mean) · rstd · (OFFSET + gain) + bias
//
// A program has its rows in registers, while those of its cluster's next block are on their way to
// shared memory. A thread takes four of its 8 channels at a time, so that its registers last. y is
// computed twice: for the largest magnitudes, which the programs tell each other, and for the result.
//
// CHANNELS is a multiple of 256 for which `Shared` fits. GAIN and BIAS say which of them there are, the
// same for all rows; without GAIN, OFFSET + gain is 1. BATCHED: there are several batch entries.
// PROGRAMS share a multiprocessor at least. PREFETCH: memory brings the block after the next to L2.
// SHARED_BYTES is what the host takes `Shared` to be.
//
// In the last block, rows behind the last change no maximum and are not stored.

constexpr int PART = 8;  // rows that are copied, summed and stored together

struct Shared {
    Rows rows;  // of the next block
    float4 factor[2][COLUMNS], shift[2][COLUMNS];  // OFFSET + gain, bias, of either half of 8 channels
    Sums sums;
    float2 norms[HELD];  // rstd, −mean · rstd
    Largest largest[2];
    u64 told[2];  // barriers: all programs have told theirs
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host gives another size");

// Of four channels.
struct Modulation {
    float4 factor, shift;
};

// y of four channels, the first or the last half of a chunk.
DEVICE void normalize(float (&values)[4], const Chunk &chunk, int half, float2 norm,
                      const Modulation &by) {
    const float factor[4] = {by.factor.x, by.factor.y, by.factor.z, by.factor.w};
    const float shift[4] = {by.shift.x, by.shift.y, by.shift.z, by.shift.w};
    float all[8];
    unpack(chunk, all);
#pragma unroll
    for (int i = 0; i < 4; i++)
        values[i] = fmaf(fmaf(all[4 * half + i], norm.x, norm.y), factor[i], shift[i]);
}

// Volatile: the compiler would load early what is used late, and keep it, for which registers lack.
DEVICE float4 load_shared(const void *at) {
    float4 x;
    asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(shared_address(at))
                 : "memory");
    return x;
}

// Makes the compiler forget what it unpacked, so that only the packed rows stay in registers.
DEVICE void stay_packed(Chunk (&kept)[KEPT]) {
#pragma unroll
    for (int r = 0; r < KEPT; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+r"(kept[r].pairs[i]));
}

// Makes the compiler compute again what follows from x, rather than keep it in registers.
DEVICE int afresh(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, PROGRAMS)
    quantize_blocks(
        const u16 *__restrict__ x,           // (B, L, C), strides (x_batch, x_row, 1)
        const Parameter *__restrict__ gain,  // (C), or null
        const Parameter *__restrict__ bias,  // as gain
        u8 *__restrict__ y,                  // (B, L, C)
        float *__restrict__ y_scale,         // (⌈B·L / 128⌉, C / 128)
        float eps, int batches, int length, long long x_batch, long long x_row) {
    extern __shared__ __align__(128) u8 memory[];
    Shared &shared = *(Shared *)memory;
    const int rank = cluster_rank();
    const int rows = batches * length, blocks = (rows + 127) / 128, clusters = gridDim.x / CLUSTER;
    const int split = split_of_thread(), column = threadIdx.x - COLUMNS * split, group = column / 16;
    const int own = KEPT * split;  // the first of the thread's rows among those held

    if (threadIdx.x == 0) {
        barrier_init(shared_address(&shared.told[0]), 1);
        barrier_init(shared_address(&shared.told[1]), 1);
        barriers_are_initialized();
    }
    cluster_arrive();
    const auto copy_rows = [&](int block) {
        const int first = 128 * block + HELD * rank + own, channel = 8 * afresh(column);
        const u16 *next = x + channel + first * x_row;
#pragma unroll
        for (int r = 0; r < KEPT; r++) {
            copy_chunk(shared_address(&shared.rows[own + r][2 * channel]),
                       row_at(x + channel, next, first + r, length, x_batch, x_row),
                       first + r < rows);
            if (r % PART == PART - 1) commit_copies();
        }
    };
    const auto row_of = [&](int row) { return row_at(x, row, length, x_batch, x_row); };
    int block = blockIdx.x / CLUSTER;
    copy_rows(block);
    if (PREFETCH) prefetch_rows(128 * (block + clusters) + HELD * rank, rows, row_of);
    if (split == 0) {
        float factor[8], shift[8] = {};
#if GAIN
        load_parameter(gain + 8 * column, factor);
#endif
#if BIAS
        load_parameter(bias + 8 * column, shift);
#endif
#pragma unroll
        for (int i = 0; i < 8; i++) factor[i] = GAIN ? factor[i] + OFFSET : 1.0f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = 4 * half;
            shared.factor[half][column] =
                make_float4(factor[i], factor[i + 1], factor[i + 2], factor[i + 3]);
            shared.shift[half][column] =
                make_float4(shift[i], shift[i + 1], shift[i + 2], shift[i + 3]);
        }
    }
    const auto modulation = [&](int half) {
        return Modulation{load_shared(&shared.factor[half][column]),
                          load_shared(&shared.shift[half][column])};
    };
    float4 norms;
    const auto norm_of = [&](int r) {
        if (r % 2 == 0) norms = load_shared(&shared.norms[own + r]);
        return r % 2 == 0 ? make_float2(norms.x, norms.y) : make_float2(norms.z, norms.w);
    };
    cluster_wait();

    for (int turn = 0; block < blocks; turn++, block += clusters) {
        const int first = 128 * block + HELD * rank, here = rows - first;
        if (KEPT > PART) {  // while the others come
            wait_copies<1>();
            __syncwarp();
            sum_channels(shared.rows, own, shared.sums);
        }
        wait_copies<0>();
        __syncwarp();
        sum_channels(shared.rows, own + KEPT - PART, shared.sums);
        __syncthreads();
        // Rows that are measured again are read from global memory: other warps go on and copy.
        measure(shared.sums, shared.norms, eps, here,
                [&](int row) { return row_of(first + row); });
        Chunk kept[KEPT];
#pragma unroll
        for (int r = 0; r < KEPT; r++) kept[r] = *(const Chunk *)&shared.rows[own + r][16 * column];
        if (block + clusters < blocks) copy_rows(block + clusters);
        if (PREFETCH) prefetch_rows(first + 256 * clusters, rows, row_of);
        __syncthreads();

        float largest = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Modulation by = modulation(half);
#pragma unroll
            for (int r = 0; r < KEPT; r++) {
                float values[4];
                normalize(values, kept[r], half, norm_of(r), by);
#pragma unroll
                for (int i = 0; i < 4; i++) largest = fmaxf(largest, fabsf(values[i]));
            }
        }
        largest = largest_of_tellers(largest, shared.largest, shared.told, turn,
                                     SPLIT * rank + split, group);
        stay_packed(kept);
        float scaling;
        const float step = int8_step(largest, scaling);
        if (rank == 0 && split == 0 && column % 16 == 0)
            y_scale[(long long)block * GROUPS + group] = step;

        u8 *const to = y + (long long)(first + own) * CHANNELS + 8 * afresh(column);
#pragma unroll
        for (int from = 0; from < KEPT; from += PART)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const Modulation by = modulation(half);
#pragma unroll
                for (int r = from; r < from + PART; r++) {
                    float values[4];
                    normalize(values, kept[r], half, norm_of(r), by);
                    kept[r].pairs[half] = pack_four(values, scaling);
                    if (half == 1 && own + r < here)
                        *(uint2 *)(to + r * CHANNELS) =
                            make_uint2(kept[r].pairs[0], kept[r].pairs[1]);
                }
            }
    }
}
