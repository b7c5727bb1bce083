// The parts of blocks.cu: norms of rows, the largest magnitudes of a cluster, rows in memory.
//
// A cluster of programs takes a block of 128 rows; a program keeps its HELD rows in shared memory,
// packed. A thread has the same 8 channels of all of them.

constexpr int CLUSTER = 8, HELD = 128 / CLUSTER;
constexpr int THREADS = CHANNELS / 8, WARPS = THREADS / 32, GROUPS = CHANNELS / 128;
constexpr int PITCH = 2 * CHANNELS + 16;  // bytes: 8 rows' chunks lie in different banks

typedef u8 Rows[HELD][PITCH];
typedef float2 Sums[HELD][WARPS];  // of a warp's channels and of their squares
typedef float Largest[CLUSTER][GROUPS];  // magnitudes in the rows of each program

// Four times 8×8 values of bf16, of a row at each lane's address.
DEVICE void load_matrices(u32 (&matrices)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}

// d (16×8) += a (16×16) · bᵀ (8×16).
DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 left, u32 right) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(left), "r"(right));
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

// Of 8 rows, the sum over the warp's 256 channels and that of their squares. The tensor cores multiply
// the rows by ones and by themselves; of the latter only the diagonal is wanted. Every second 8 channels
// are taken as further rows. They drop the last bits of a sum, so a warp adds 8 products only.
DEVICE void sum_channels(const Rows &rows, int first, Sums &sums) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 from = shared_address(&rows[first + lane % 8][512 * warp + lane / 8 * 16]);
    constexpr u32 ones = 0x3F803F80u;
    float all[4] = {}, upper[4] = {}, lower[4] = {};
#pragma unroll 4
    for (int k = 0; k < 8; k++) {
        u32 x[4];  // 8 channels each
        load_matrices(x, from + 64 * k);
        multiply(all, x, ones, ones);
        multiply(upper, x, x[0], x[2]);
        multiply(lower, x, x[1], x[3]);
    }
    // A lane has columns 2 · (lane % 4) and the next of row lane / 4, and of the row 8 below.
    const int row = lane / 4;
    if (lane % 4 == row / 2)
        sums[first + row][warp] = make_float2(
            all[0] + all[2], row % 2 ? upper[1] + lower[3] : upper[0] + lower[2]);
}

// (x − mean)², summed over a row by a warp.
DEVICE float sum_apart(const u16 *row, float mean) {
    float sum = 0.0f;
#pragma unroll 1
    for (int c = threadIdx.x % 32; c < THREADS; c += 32) {
        float values[8];
        unpack(*(const Chunk *)(row + 8 * c), values);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float apart = values[i] - mean;
            sum = fmaf(apart, apart, sum);
        }
    }
    return warp_sum(sum);
}

// 1 / √(variance + eps) of PART held rows, and −mean times that: a row in 8 lanes. Where most of the
// squares' sum is the mean's, what is left has lost digits: the warp sums them again, about the mean.
// Rows from `here` on do not exist: their NaN changes no maximum.
DEVICE void measure(const Rows &rows, const Sums &sums, float2 (&norms)[HELD], float eps, int from,
                    int here) {
    const int lane = threadIdx.x % 32;
    for (int row = from + threadIdx.x / 8; row < from + PART; row += THREADS / 8) {
        float mean = 0.0f, square = 0.0f;
#pragma unroll
        for (int w = lane % 8; w < WARPS; w += 8)
            mean += sums[row][w].x, square += sums[row][w].y;
#pragma unroll
        for (int lanes = 4; lanes; lanes >>= 1) {
            mean += __shfl_xor_sync(0xffffffffu, mean, lanes);
            square += __shfl_xor_sync(0xffffffffu, square, lanes);
        }
        mean *= 1.0f / CHANNELS, square *= 1.0f / CHANNELS;
        float variance = fmaf(-mean, mean, square);
        const bool lost = row < here && variance < square * (1.0f / 32.0f);
        for (u32 left = __ballot_sync(0xffffffffu, lost) & 0x01010101u; left; left &= left - 1) {
            const int other = __ffs(left) - 1, apart = (other - lane / 8 * 8) / 8;
            const float about = __shfl_sync(0xffffffffu, mean, other);
            const float again = sum_apart((const u16 *)rows[row + apart], about) * (1.0f / CHANNELS);
            if (apart == 0) variance = again;
        }
        const float rstd = row < here ? rsqrtf(variance + eps) : __uint_as_float(0x7FC00000u);
        if (lane % 8 == 0) norms[row] = make_float2(rstd, -mean * rstd);
    }
}

// The largest magnitude of each group among the programs, each of which tells its own. Every other
// time, another barrier and place are used.
DEVICE float largest_of_programs(float own, Largest (&places)[2], const u64 (&told)[2], int turn,
                                 int rank, int group) {
    const int lane = threadIdx.x % 16;
    const u32 barrier = shared_address(&told[turn % 2]);
    Largest &of_programs = places[turn % 2];
    own = largest_of_lanes(own);
    if (threadIdx.x == 0) barrier_expect(barrier, sizeof(of_programs));
    if (lane < CLUSTER) tell(shared_address(&of_programs[rank][group]), own, barrier, lane);
    barrier_wait(barrier, turn / 2 % 2);
    return largest_of_lanes(of_programs[lane % CLUSTER][group]);
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

template <typename T>
DEVICE const T *row_at(const T *tensor, int row, int length, long long batch_stride,
                       long long row_stride) {
    const T *from = tensor + row * row_stride;
    return row_at(tensor, from, row, length, batch_stride, row_stride);
}

// A load that stays in its place: brought forward, more of them would be on their way than registers hold.
// Zeros where there is nothing.
DEVICE Chunk load_chunk_here(const u16 *at, bool exists) {
    Chunk chunk = {};
    asm volatile(
        "{\n.reg .pred exists;\nsetp.ne.u32 exists, %5, 0;\n"
        "@exists ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}\n"
        : "+r"(chunk.pairs[0]), "+r"(chunk.pairs[1]), "+r"(chunk.pairs[2]), "+r"(chunk.pairs[3])
        : "l"(at), "r"((u32)exists)
        : "memory");
    return chunk;
}

DEVICE void wait_cycles(int cycles) {
    for (const long long start = clock64(); clock64() - start < cycles;) {
    }
}
