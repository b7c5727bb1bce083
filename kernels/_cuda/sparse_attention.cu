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
// With QUANTIZED the result is e4m3, with a scale for the 128 channels of a token and head.
//
// The integer sums start at 1.5·2²³ in the bits of a float, so that they are floats when summed:
// 12582912 + s, exact as long as |s| < 2²²; 128·127² is below that.

constexpr int HEAD_DIM = 128, BLOCK_Q = 64, BLOCK_K = 128, THREADS = 128;
#ifndef STAGES
#define STAGES 2
#endif
#ifndef PER_PROCESSOR
#define PER_PROCESSOR 3
#endif
constexpr u32 Q_BYTES = BLOCK_Q * HEAD_DIM, TILE_BYTES = BLOCK_K * HEAD_DIM;
constexpr int PITCH = HEAD_DIM + 8;  // of a row of floats, so that a warp's rows lie in other banks
constexpr u32 MAGIC = 0x4B400000u;
constexpr float MAGIC_VALUE = 12582912.0f, LOG2_448 = 8.807354922057604f;
// Up to here an exponent, from which 1.5·2²³ times the factor is taken, is right to 2⁻⁹.
constexpr float COARSE_FACTOR = 1.0f / 384.0f;
constexpr float LARGEST_FACTOR = 1e31f;  // times an integer sum it is still a number

// d (64×128, int32) += a (64×32 int8, shared) · b (128×32 int8, shared)ᵀ
DEVICE void multiply_int8(u32 (&d)[64], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " NAMES64 ", %64, %65, 1;"
                 : R64("+r")
                 : "l"(a), "l"(b));
}

// d (64×128, float) = a (64×32 e4m3, registers) · b (128×32 e4m3, shared)ᵀ
DEVICE void multiply_fp8(float (&d)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " NAMES64
                 ", {%64,%65,%66,%67}, %68, 0, 1, 1;"
                 : R64("=f")
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

// The same product, added to d.
DEVICE void multiply_add_fp8(float (&d)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " NAMES64
                 ", {%64,%65,%66,%67}, %68, 1, 1, 1;"
                 : R64("+f")
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
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
// Sums run in several chains, since few warps share a scheduler. Maxima are taken of the bits, which
// order positive floats as integers and have an instruction for three operands.
DEVICE void take_exponentials(u32 (&s)[64], float (&shrink)[2], Rows &rows, float k_step) {
    int top[2][2];
    float sum[2][2] = {};
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int pair = max((int)s[4 * j + 2 * r], (int)s[4 * j + 2 * r + 1]);
            top[r][j % 2] = j < 2 ? pair : max(pair, top[r][j % 2]);
        }
    float factor[2], offset[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float top_here = quad_max(__int_as_float(max(top[r][0], top[r][1])));
        factor[r] = rows.step[r] * k_step;
        if (factor[r] > LARGEST_FACTOR) factor[r] = LARGEST_FACTOR;
        const float here = (top_here - MAGIC_VALUE) * factor[r];
        const float row_top = fmaxf(rows.largest[r], here);
        shrink[r] = exp2_fast(rows.largest[r] - row_top);
        rows.largest[r] = row_top;
        offset[r] = fmaf(-MAGIC_VALUE, factor[r], LOG2_448 - row_top);
        if (factor[r] > COARSE_FACTOR) {
#pragma unroll
            for (int j = 0; j < 16; j++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++)
                    s[4 * j + i] = __float_as_uint(__uint_as_float(s[4 * j + i]) - top_here);
            offset[r] = LOG2_448 + (here - row_top);
        }
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

// P·v of one key block, apart from the sums of those before it: the tensor cores add e4m3 products
// with fewer bits than a float has.
DEVICE void start_output(float (&o)[64], const u32 (&p)[16], u32 v) {
    u64 b = descriptor(v);
    mma_fence();
    multiply_fp8(o, p[0], p[1], p[2], p[3], b);
#pragma unroll
    for (int step = 1; step < 4; step++)
        multiply_add_fp8(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
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
    const Chunk *branch,      // (B, L, H, 128) bf16, added to the result; or null
    void *o,                  // (B, L, H, 128) bf16; e4m3 if QUANTIZED
    float *o_scale,           // (B·L, H) with strides (1, B·L), if QUANTIZED
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
    auto copy_block = [&](int index, int slot) {  // k and v of a list's entry
        const u64 tile = (u64)(first_tile + lists[list + index]) * TILE_BYTES;
        copy_tile(k_tiles + slot * TILE_BYTES, k + tile, TILE_BYTES, k_ready + 8 * slot);
        copy_tile(v_tiles + slot * TILE_BYTES, v + tile, TILE_BYTES, v_ready + 8 * slot);
    };

    if (thread == 0) {
        for (int i = 0; i < 1 + 2 * STAGES; i++) barrier_init(q_ready + 8 * i, 1);
        barriers_are_initialized();
        fence_async();
        copy_tile(q_tile, q + (u64)place * Q_BYTES, Q_BYTES, q_ready);
        for (int i = 0; i < STAGES && i < keep; i++) copy_block(i, i);
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
    int block = lists[list];
    float k_step = k_scale[first_tile + block];
    barrier_wait(q_ready, 0);
    for (int j = 0; j < keep; j++) {
        barrier_wait(k_ready + 8 * slot, parity);
        start_products(s, q_tile, k_tiles + slot * TILE_BYTES);
        const int next_block = lists[list + (j + 1 < keep ? j + 1 : j)];
        const float next_step = k_scale[first_tile + next_block];
        mma_wait<0>();
        if ((block + 1) * BLOCK_K > length) hide_tokens(s, length - block * BLOCK_K, lane);
        take_exponentials(s, shrink, rows, k_step);
        pack_operand(s, p);
        float output[64];
        barrier_wait(v_ready + 8 * slot, parity);
        start_output(output, p, v_tiles + slot * TILE_BYTES);
        mma_wait<0>();
#pragma unroll
        for (int i = 0; i < 64; i++) asm volatile("" : "+f"(output[i]));
        __syncthreads();
        if (thread == 0 && j + STAGES < keep) copy_block(j + STAGES, slot);
#pragma unroll
        for (int i = 0; i < 64; i++) sums[i] = fmaf(sums[i], shrink[(i >> 1) & 1], output[i]);
        if (++slot == STAGES) slot = 0, parity ^= 1;
        block = next_block;
        k_step = next_step;
    }

    // Through shared memory, where no tile is needed any more: a row of the result to 16 lanes.
    float *const own = (float *)(memory + (k_tiles - shared_address(memory))) + warp * 16 * PITCH;
    const u32 batch = head / heads, own_head = head % heads;
    const int half = lane >> 4, chunk = lane & 15, first = query_block * BLOCK_Q + warp * 16;
    const long long first_row = (long long)batch * length + first;
    Chunk added[8];  // all on their way before the first is used
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const long long at = ((first_row + 2 * i + half) * heads + own_head) * 16 + chunk;
        added[i] = branch && first + 2 * i + half < length ? branch[at] : Chunk{};
    }
    const float *channel_scale = v_scale + head * HEAD_DIM + 2 * (lane & 3);
    const float factors[2] = {1.0f / quad_sum(rows.total[0]), 1.0f / quad_sum(rows.total[1])};
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const float2 step = *(const float2 *)(channel_scale + 8 * j);
#pragma unroll
        for (int r = 0; r < 2; r++)
            *(float2 *)(own + ((lane >> 2) + 8 * r) * PITCH + 8 * j + 2 * (lane & 3)) =
                make_float2(sums[4 * j + 2 * r] * (factors[r] * step.x),
                            sums[4 * j + 2 * r + 1] * (factors[r] * step.y));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float4 *row_part = (const float4 *)(own + (2 * i + half) * PITCH + 8 * chunk);
        const float4 low = row_part[0], high = row_part[1];
        float values[8];
        unpack(added[i], values);
        values[0] += low.x, values[1] += low.y, values[2] += low.z, values[3] += low.w;
        values[4] += high.x, values[5] += high.y, values[6] += high.z, values[7] += high.w;
        const long long at = ((first_row + 2 * i + half) * heads + own_head) * 16 + chunk;
        const bool exists = first + 2 * i + half < length;
#if QUANTIZED
        u32 quantized[2];
        const float step = quantize_group(values, quantized);
        if (!exists) continue;
        ((uint2 *)o)[at] = make_uint2(quantized[0], quantized[1]);
        const long long all_rows = (long long)(gridDim.y / heads) * length;
        if (chunk == 0) o_scale[own_head * all_rows + first_row + 2 * i + half] = step;
#else
        if (exists) ((Chunk *)o)[at] = pack(values);
#endif
    }
}
