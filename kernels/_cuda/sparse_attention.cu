// Attention of each 64-query block over the 128-key blocks of its list, for Hopper (sm_90a).
//
//     o = softmax(q·kᵀ / √D over the kept blocks)·v + branch,  D = 128
//
// q and k are int8, P and v e4m3; sums are 32 bits. One warpgroup takes one query block, one
// product after the other; three of them share a multiprocessor, so that one takes exponentials
// while another multiplies. Softmax runs online in base 2 (arXiv 1805.02867).
//
// Tiles lie in global memory as the tensor cores read them from shared memory (rows of 128 bytes,
// 16-byte chunks exchanged by `chunk ^ (row % 8)`), so one bulk copy brings a tile. In each 32
// tokens of v their order is such that a thread's sums of q·kᵀ are, rounded, its operand of P·v.
//
// The integer sums start at 1.5·2²³ in the bits of a float, so that they are floats when summed:
// 12582912 + s, exact as long as |s| < 2²²; 128·127² is below that.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

#define DEVICE static __device__ __forceinline__

constexpr int HEAD_DIM = 128, BLOCK_Q = 64, BLOCK_K = 128, THREADS = 128;
#ifndef STAGES
#define STAGES 2
#endif
#ifndef PER_PROCESSOR
#define PER_PROCESSOR 3
#endif
constexpr u32 Q_BYTES = BLOCK_Q * HEAD_DIM, TILE_BYTES = BLOCK_K * HEAD_DIM;
constexpr u32 MAGIC = 0x4B400000u;
constexpr float MAGIC_VALUE = 12582912.0f, LOG2_448 = 8.807354922057604f;

DEVICE u32 shared_address(const void *pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}

DEVICE void barrier_init(u32 barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier));
}

DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN;\n}\n" ::"r"(barrier), "r"(parity) : "memory");
}

DEVICE void copy_tile(u32 target, const void *source, u32 bytes, u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            target),
        "l"(source), "r"(bytes), "r"(barrier)
        : "memory");
}

// A matrix descriptor of a tile with rows of 128 bytes, 128-byte swizzle, 8 rows to a group.
DEVICE u64 descriptor(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | ((u64)1 << 16) | ((u64)(1024 >> 4) << 32) |
           ((u64)1 << 62);
}

DEVICE void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define R8(x, i) \
    x(d[i]), x(d[i + 1]), x(d[i + 2]), x(d[i + 3]), x(d[i + 4]), x(d[i + 5]), x(d[i + 6]), x(d[i + 7])
#define R64(x) R8(x, 0), R8(x, 8), R8(x, 16), R8(x, 24), R8(x, 32), R8(x, 40), R8(x, 48), R8(x, 56)
#define NAMES64                                                                                    \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"  \
    "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"

// d (64×128, int32) += a (64×32 int8, shared) · b (128×32 int8, shared)ᵀ
DEVICE void multiply_int8(u32 (&d)[64], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " NAMES64 ", %64, %65, 1;"
                 : R64("+r")
                 : "l"(a), "l"(b));
}

// d (64×128, float) += a (64×32 e4m3, registers) · b (128×32 e4m3, shared)ᵀ
DEVICE void multiply_fp8(float (&d)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " NAMES64
                 ", {%64,%65,%66,%67}, %68, 1, 1, 1;"
                 : R64("+f")
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Four floats as e4m3, the first in the lowest byte.
DEVICE u32 pack_e4m3(float a, float b, float c, float d) {
    u16 low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return (u32)low | ((u32)high << 16);
}

DEVICE u32 pack_bf16(float a, float b) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
    return packed;
}

DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

DEVICE void start_products(u32 (&s)[64], u32 q, u32 k) {
#pragma unroll
    for (int i = 0; i < 64; i++) s[i] = MAGIC;
    u64 a = descriptor(q), b = descriptor(k);
    mma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) multiply_int8(s, a + 2 * step, b + 2 * step);
    mma_commit();
}

struct Rows {  // of a thread: query rows g and g + 8 of its warp's 16
    float step[2];     // dequantization of q times log2(e) / √D
    float largest[2];  // running maximum, base 2
    float total[2];    // this thread's part of the normalizer, times 448
};

// One key block: `s` becomes exponentials times 448; `shrink` is what the old sums shrink by.
// Maxima and sums run in several chains, since few warps share a scheduler.
DEVICE void take_exponentials(u32 (&s)[64], float (&shrink)[2], Rows &rows, float k_step) {
    float top[2][4], sum[2][2] = {};
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float pair = fmaxf(__uint_as_float(s[4 * j + 2 * r]),
                               __uint_as_float(s[4 * j + 2 * r + 1]));
            top[r][j % 4] = j < 4 ? pair : fmaxf(top[r][j % 4], pair);
        }
    float factor[2], offset[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float row_top = quad_max(fmaxf(fmaxf(top[r][0], top[r][1]), fmaxf(top[r][2], top[r][3])));
        factor[r] = rows.step[r] * k_step;
        row_top = fmaxf(rows.largest[r], (row_top - MAGIC_VALUE) * factor[r]);
        shrink[r] = exp2_fast(rows.largest[r] - row_top);
        rows.largest[r] = row_top;
        offset[r] = fmaf(-MAGIC_VALUE, factor[r], LOG2_448 - row_top);
    }
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = i >> 1;
            float e = exp2_fast(fmaf(__uint_as_float(s[4 * j + i]), factor[r], offset[r]));
            sum[r][i & 1] += e;
            s[4 * j + i] = __float_as_uint(e);
        }
#pragma unroll
    for (int r = 0; r < 2; r++)
        rows.total[r] = fmaf(rows.total[r], shrink[r], sum[r][0] + sum[r][1]);
}

// The exponentials as the e4m3 operand of four products, 32 tokens each.
DEVICE void pack_operand(const u32 (&s)[64], u32 (&p)[16]) {
#pragma unroll
    for (int c = 0; c < 8; c++)  // 16 columns: 8·(2c) + 2t … and 8·(2c + 1) + 2t …
#pragma unroll
        for (int r = 0; r < 2; r++)
            p[2 * c + r] =
                pack_e4m3(__uint_as_float(s[8 * c + 2 * r]), __uint_as_float(s[8 * c + 2 * r + 1]),
                          __uint_as_float(s[8 * c + 4 + 2 * r]),
                          __uint_as_float(s[8 * c + 5 + 2 * r]));
}

DEVICE void hide_tokens(u32 (&s)[64], int tokens, int lane) {
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (8 * j + 2 * (lane & 3) + (i & 1) >= tokens) s[4 * j + i] = 0xFF800000u;  // −∞
}

DEVICE void start_output(float (&o)[64], const u32 (&p)[16], u32 v) {
    u64 b = descriptor(v);
    mma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++)
        multiply_fp8(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                     b + 2 * step);
    mma_commit();
}

extern "C" __global__ void __launch_bounds__(THREADS, PER_PROCESSOR) sparse_attention(
    const u8 *q,              // (B·H, NQ, 64, 128) int8, tiles swizzled
    const float *q_scale,     // (B·H, NQ, 64)
    const u8 *k,              // (B·H, NK, 128, 128) int8, tiles swizzled
    const float *k_scale,     // (B·H, NK)
    const u8 *v,              // (B·H, NK, 128, 128) e4m3: channel, token; swizzled and reordered
    const float *v_scale,     // (B·H, 128)
    const int *lists,         // (B·H, NQ, keep), ascending
    const u32 *branch,        // (B, L, H, 128) bf16, added to the result; or null
    u32 *o,                   // (B, L, H, 128) bf16
    int length, int heads, int queries, int blocks, int keep, float scale) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ u64 barriers[1 + 2 * STAGES];
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int query_block = blockIdx.x;
    const u32 head = blockIdx.y, place = head * queries + query_block;
    const u32 q_tile = (shared_address(memory) + 1023) & ~1023u;
    const u32 k_tiles = q_tile + Q_BYTES, v_tiles = k_tiles + STAGES * TILE_BYTES;
    const u32 q_ready = shared_address(barriers), k_ready = q_ready + 8,
              v_ready = k_ready + 8 * STAGES;
    const u32 list = place * keep, first_tile = head * blocks;
    auto copy_block = [&](const u8 *tiles, u32 target, int index, u32 barrier) {
        u64 tile = first_tile + lists[list + index];
        copy_tile(target, tiles + tile * TILE_BYTES, TILE_BYTES, barrier);
    };

    if (thread == 0) {
        for (int i = 0; i < 1 + 2 * STAGES; i++) barrier_init(q_ready + 8 * i);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        copy_tile(q_tile, q + (u64)place * Q_BYTES, Q_BYTES, q_ready);
        for (int i = 0; i < STAGES && i < keep; i++) {
            copy_block(k, k_tiles + i * TILE_BYTES, i, k_ready + 8 * i);
            copy_block(v, v_tiles + i * TILE_BYTES, i, v_ready + 8 * i);
        }
    }
    const int row = warp * 16 + (lane >> 2);
    Rows rows;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        rows.step[r] = q_scale[place * BLOCK_Q + row + 8 * r] * scale;
        rows.largest[r] = -__int_as_float(0x7F800000);
        rows.total[r] = 0.0f;
    }
    float sums[64];
#pragma unroll
    for (int i = 0; i < 64; i++) sums[i] = 0.0f;
    __syncthreads();

    u32 s[64], p[16];
    float shrink[2];
    int slot = 0;
    u32 parity = 0;
    barrier_wait(q_ready, 0);
    for (int j = 0; j < keep; j++) {
        const int block = lists[list + j];
        const float k_step = k_scale[first_tile + block];
        barrier_wait(k_ready + 8 * slot, parity);
        start_products(s, q_tile, k_tiles + slot * TILE_BYTES);
        mma_wait<0>();
        __syncthreads();
        if (thread == 0 && j + STAGES < keep)
            copy_block(k, k_tiles + slot * TILE_BYTES, j + STAGES, k_ready + 8 * slot);
        if ((block + 1) * BLOCK_K > length) hide_tokens(s, length - block * BLOCK_K, lane);
        take_exponentials(s, shrink, rows, k_step);
#pragma unroll
        for (int i = 0; i < 64; i++) sums[i] *= shrink[(i >> 1) & 1];
        pack_operand(s, p);
        barrier_wait(v_ready + 8 * slot, parity);
        start_output(sums, p, v_tiles + slot * TILE_BYTES);
        mma_wait<0>();
        __syncthreads();
        if (thread == 0 && j + STAGES < keep)
            copy_block(v, v_tiles + slot * TILE_BYTES, j + STAGES, v_ready + 8 * slot);
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }

    const u32 batch = head / heads;
    const u32 own_head = head % heads;
    const float *channel_scale = v_scale + head * HEAD_DIM + 2 * (lane & 3);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int token = query_block * BLOCK_Q + row + 8 * r;
        const float factor = 1.0f / quad_sum(rows.total[r]);
        if (token >= length) continue;
        const long long at =
            (((long long)batch * length + token) * heads + own_head) * (HEAD_DIM / 2) + (lane & 3);
#pragma unroll
        for (int j = 0; j < 16; j++) {
            float a = sums[4 * j + 2 * r] * factor * channel_scale[8 * j];
            float b = sums[4 * j + 2 * r + 1] * factor * channel_scale[8 * j + 1];
            if (branch) {
                u32 both = branch[at + 4 * j];
                a += __uint_as_float(both << 16);
                b += __uint_as_float(both & 0xFFFF0000u);
            }
            o[at + 4 * j] = pack_bf16(a, b);
        }
    }
}
