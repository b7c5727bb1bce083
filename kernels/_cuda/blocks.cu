// Add a gated branch to rows, normalize and modulate them and store them in int8, each value read and
// written once, with a scale for a block of 128 rows and 128 channels.
//
//     x' = x + branch · gate
//     y = (x' − mean) · rstd · (OFFSET + gain) + bias
//
// A cluster of CLUSTER programs, 8 or 16, takes a block of 128 rows; a program keeps its HELD rows in
// shared memory, packed. A thread has the same 8 channels of all of them, so gain and bias are read
// once. y is computed twice: for the largest magnitudes, which the programs tell each other, and for
// the result. While that is stored, the rows of the cluster's next block are copied to where they were.
//
// CHANNELS is a multiple of 256 up to 6144. BRANCH, GATE, GAIN and BIAS say which of them there are;
// without GAIN, OFFSET + gain is 1. PER_TOKEN: these parameters are not the same for all rows. BATCHED:
// there are several batch entries. PROGRAMS share a multiprocessor at least; STEP rows of the branch
// are loaded at once, UNROLL rows normalized. SHARED_BYTES is what the host takes `Shared` to be.
//
// In the last block, rows behind the last are zeros, change no maximum and are not stored.

constexpr int THREADS = CHANNELS / 8, WARPS = THREADS / 32, GROUPS = CHANNELS / 128;
constexpr int HELD = 128 / CLUSTER;
constexpr int PITCH = 2 * CHANNELS + 16;  // bytes: 8 rows' chunks lie in different banks

struct Shared {
    u8 rows[HELD][PITCH];
    float2 sums[HELD][WARPS];  // of a warp's channels and of their squares
    float2 norms[HELD];        // rstd, −mean · rstd
    float largest[2][CLUSTER][GROUPS];  // magnitudes in each program's rows, of every other block
    u64 told[2];  // barriers: all programs have told theirs
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host gives another size");

// Four times 8×8 values of bf16, of a row at each lane's address.
DEVICE void load_matrices(u32 (&matrices)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}

// d (16×8) += a (16×8) · bᵀ (8×8).
DEVICE void multiply(float (&d)[4], u32 upper, u32 lower, u32 b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(upper), "r"(lower), "r"(b));
}

// Stores a float in the shared memory of the program of that rank and counts it for its barrier there.
DEVICE void tell(u32 target, float x, u32 barrier, u32 rank) {
    asm volatile(
        "{\n.reg .u32 there, counted;\n"
        "mapa.shared::cluster.u32 there, %0, %3;\n"
        "mapa.shared::cluster.u32 counted, %2, %3;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %1, [counted];\n}\n" ::"r"(
            target),
        "f"(x), "r"(barrier), "r"(rank)
        : "memory");
}

// Of each held row, the sum over the warp's 256 channels and that of their squares. The tensor cores
// multiply the rows by ones and by themselves; of the latter only the diagonal is wanted. They drop the
// last bits of a sum, so a warp adds 16 or 32 products only.
DEVICE void sum_channels(Shared &shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 from = shared_address(&shared.rows[lane % HELD][512 * warp + lane / HELD * 16]);
    constexpr u32 ones = 0x3F803F80u;
    float sums[4] = {}, upper[4] = {}, lower[4] = {};
#pragma unroll 4
    for (int k = 0; k < HELD; k++) {
        u32 x[4];  // 8 rows, then the 8 below or else the next 8 channels of the same; and again
        load_matrices(x, from + 512 / HELD * k);
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            multiply(sums, x[i], x[i + 1], ones);
            multiply(upper, x[i], x[i + 1], x[i]);
            multiply(lower, x[i], x[i + 1], x[i + 1]);
        }
    }
    // A lane has columns 2 · (lane % 4) and the next of row lane / 4, and of the row 8 below.
    const int row = lane / 4;
    if (lane % 4 == row / 2) {
        const float2 above = make_float2(sums[0], row % 2 ? upper[1] : upper[0]);
        const float2 below = make_float2(sums[2], row % 2 ? lower[3] : lower[2]);
#if CLUSTER == 8
        shared.sums[row][warp] = above;
        shared.sums[row + 8][warp] = below;
#else
        shared.sums[row][warp] = make_float2(above.x + below.x, above.y + below.y);
#endif
    }
}

// (x − mean)², summed over a held row by a warp.
DEVICE float sum_apart(const Shared &shared, int row, float mean) {
    float sum = 0.0f;
    for (int c = threadIdx.x % 32; c < THREADS; c += 32) {
        float values[8];
        unpack(*(const Chunk *)&shared.rows[row][16 * c], values);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float apart = values[i] - mean;
            sum = fmaf(apart, apart, sum);
        }
    }
    return warp_sum(sum);
}

// 1 / √(variance + eps) of each held row, and −mean times that: a row in 8 lanes. Where most of the
// squares' sum is the mean's, what is left has lost digits: the warp sums them again, about the mean.
DEVICE void measure(Shared &shared, float eps) {
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 8; row < HELD; row += THREADS / 8) {
        float mean = 0.0f, square = 0.0f;
#pragma unroll
        for (int w = lane % 8; w < WARPS; w += 8)
            mean += shared.sums[row][w].x, square += shared.sums[row][w].y;
#pragma unroll
        for (int lanes = 4; lanes; lanes >>= 1) {
            mean += __shfl_xor_sync(0xffffffffu, mean, lanes);
            square += __shfl_xor_sync(0xffffffffu, square, lanes);
        }
        mean *= 1.0f / CHANNELS, square *= 1.0f / CHANNELS;
        float variance = fmaf(-mean, mean, square);
        const bool lost = variance < square * (1.0f / 32.0f);
        for (u32 left = __ballot_sync(0xffffffffu, lost) & 0x01010101u; left; left &= left - 1) {
            const int other = __ffs(left) - 1, apart = (other - lane / 8 * 8) / 8;
            const float about = __shfl_sync(0xffffffffu, mean, other);
            const float again = sum_apart(shared, row + apart, about) * (1.0f / CHANNELS);
            if (apart == 0) variance = again;
        }
        const float rstd = rsqrtf(variance + eps);
        if (lane % 8 == 0) shared.norms[row] = make_float2(rstd, -mean * rstd);
    }
}

// Where a row begins in a tensor. Without batches it is `next`, which goes to the row after.
template <typename T>
DEVICE const T *row_at(const T *tensor, const T *&next, int row, int length, long long batch_stride,
                       long long row_stride) {
#if BATCHED
    return tensor + (row / length * batch_stride + row % length * row_stride);
#else
    const T *at = next;
    next += row_stride;
    return at;
#endif
}

DEVICE const Parameter *parameter_at(const Parameter *parameter, int row, int length,
                                     long long batch_stride, long long row_stride) {
    const Parameter *from = parameter + row * row_stride;
    return row_at(parameter, from, row, length, batch_stride, row_stride);
}

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
    const int rank = cluster_rank(), lane = threadIdx.x % 16, group = threadIdx.x / 16;
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
        load_parameter(parameter_at(gain, row, length, gain_batch, gain_row), factor);
#pragma unroll
        for (int i = 0; i < 8; i++) factor[i] += OFFSET;
#endif
#if BIAS
        load_parameter(parameter_at(bias, row, length, bias_batch, bias_row), shift);
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
                load_parameter(parameter_at(gate, min(first + r, rows - 1), length, gate_batch,
                                            gate_row),
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
        __syncwarp();
        sum_channels(shared);
        __syncthreads();
        measure(shared, eps);
        __syncthreads();

        float largest = 0.0f;
#pragma unroll UNROLL
        for (int r = 0; r < HELD; r++) {
#if PER_TOKEN
            load_modulation(min(first + r, rows - 1), factor, shift);
#endif
            float values[8];
            normalize(values, shared, r, factor, shift);
            const float of_row = largest_of(values, 0.0f);
            largest = fmaxf(largest, r < here ? of_row : 0.0f);
        }
        largest = largest_of_lanes(largest);
        const u32 told = shared_address(&shared.told[turn % 2]);
        float (&of_programs)[CLUSTER][GROUPS] = shared.largest[turn % 2];
        if (threadIdx.x == 0) barrier_expect(told, sizeof(of_programs));
        if (lane < CLUSTER) tell(shared_address(&of_programs[rank][group]), largest, told, lane);
        barrier_wait(told, turn / 2 % 2);
        float scaling;
        const float step =
            int8_step(largest_of_lanes(of_programs[lane % CLUSTER][group]), scaling);
        if (rank == 0 && lane == 0) y_scale[(long long)block * GROUPS + group] = step;

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
