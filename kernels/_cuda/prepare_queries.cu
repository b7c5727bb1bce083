// int8 tiles of queries, block means, and the linear branch's result, for Hopper (sm_90a):
//
//     branch = φ(q)·matrix / (φ(q)·normalizer + eps) + bias
//
// A warp takes 16 tokens of one head, a warpgroup a block of 64; a program holds the matrices of
// HEADS heads, whose warpgroups take the same tokens, so that they share the tables in the
// first-level cache. Lane 4g + t holds tokens g and g + 8, their chunks t, t + 4, t + 8 and t + 12:
// pairs to rotate lie in one lane, a token in four. Products do not depend on the order of channels:
// rounded to bf16, what a lane holds is its operand of the product, if the matrix's rows are in the
// same order, and its columns are in the order that gives a lane whole chunks of the result.
// The normalizer is the matrix's last 8 columns, as the sum of two bf16 in neighbouring ones; φ(q)'s
// scale divides out, so softmax needs no sum if eps has been added to the normalizer.

constexpr int BLOCK = 64, GROUPS = 4, THREADS = 128 * GROUPS, BLOCKS_AT_ONCE = GROUPS / HEADS;
constexpr int COLUMNS = HEAD_DIM + 8;
constexpr u32 SLOT_BYTES = 16 * HEAD_DIM * 2, HALF_BYTES = COLUMNS * 128, MATRIX_BYTES = 2 * HALF_BYTES;
constexpr u32 TILE_BYTES = BLOCK * HEAD_DIM, SUMS_BYTES = 2 * 4 * HEAD_DIM * 4;  // of a warpgroup

// d (64×136) = a (64×16 bf16, registers) · b (136×16 bf16, shared)ᵀ + d, or without d
DEVICE void multiply(float (&d)[68], const u32 (&a)[4], u64 b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %73, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n136k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
        "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,"
        "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67}, "
        "{%68,%69,%70,%71}, %72, add, 1, 1, 0;\n}\n"
        : R8("+f", 0), R8("+f", 8), R8("+f", 16), R8("+f", 24), R8("+f", 32), R8("+f", 40),
          R8("+f", 48), R8("+f", 56), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

DEVICE void wait_for_warpgroup(int barrier) {
    asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}

DEVICE u32 select_half(u32 a, u32 b, int upper) { return __byte_perm(a, b, upper ? 0x7632 : 0x5410); }

// The channel that is row `k` of the matrix: slot k % 16 of product k / 16.
DEVICE int channel_of_row(int k) {
    const int step = k >> 4, slot = k & 15, quad_lane = (slot & 7) >> 1;
    return 8 * (quad_lane + 4 * (step >> 1)) + 4 * (step & 1) + 2 * (slot >> 3) + (slot & 1);
}

// Of eight rows from `k` on: `chunk` is eight channels of the result, which become 8 columns.
DEVICE void place_matrix(u32 target, const u16 *matrix, int k, int chunk) {
    Chunk rows[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
        rows[i] = *(const Chunk *)(matrix + channel_of_row(k + i) * HEAD_DIM + 8 * chunk);
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
        const float value = normalizer[channel_of_row(k + i)] + (MAP == 0 ? eps : 0.0f);
        const float leading = __uint_as_float(pack_bf16(value, 0.0f) << 16);
        values[i] = c & 1 ? value - leading : leading;
    }
    store_shared(target + (k >> 6) * HALF_BYTES + swizzled(HEAD_DIM + c, (k & 63) >> 3), pack(values));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) prepare_queries(
    const u16 *q,             // head h of token t of batch b at b·q_batch + t·q_token + h·q_head
    const float *rstd,        // (B, L)
    const Weight *weight,     // (H·128,), or null
    const float *cos,         // (L, 64), or null: q is used as it is
    const float *sin,
    const u16 *matrix,        // (B·H, 128, 128) bf16: φ(q)'s channel, the result's; not if LINEAR is 0
    const float *normalizer,  // (B·H, 128)
    const float *bias,        // (128,), or null
    u8 *q_int8,               // (B·H, NQ, 64, 128): token, channels as tokens.cuh orders them
    float *q_scale,           // (B·H, NQ, 64)
    float *q_means,           // (B·H, NQ, 128)
    u16 *branch,              // (B, L, H, 128) bf16
    float eps, int length, int heads, int all_heads, int blocks, int per_part,
    long long q_batch, long long q_token, long long q_head) {
    extern __shared__ u8 memory[];
    const u32 matrices = (shared_address(memory) + 1023) & ~1023u;
    const u32 ring = matrices + LINEAR * HEADS * MATRIX_BYTES;
    const u32 all_sums = ring + 4 * GROUPS * STAGES * SLOT_BYTES;
    const u32 all_weights = all_sums + GROUPS * SUMS_BYTES, biases = all_weights + HEADS * 512;
    const int thread = threadIdx.x, lane = thread & 31, warp = (thread >> 5) & 3, group = thread >> 7;
    const int g = lane >> 2, t = lane & 3;

    const int first_head = blockIdx.y * HEADS;
    for (int task = thread; task < HEADS * HEAD_DIM; task += THREADS) {
        const int own = first_head + task / HEAD_DIM, at = own % heads * HEAD_DIM + task % HEAD_DIM;
#if WEIGHT == 2
        const float value = own < all_heads ? __uint_as_float((u32)weight[at] << 16) : 0.0f;
#elif WEIGHT == 1
        const float value = own < all_heads ? weight[at] : 0.0f;
#else
        const float value = 1.0f;
#endif
        store_shared(all_weights + 4 * task, __float_as_uint(value));
    }
#if LINEAR
    if (thread < HEAD_DIM)
        store_shared(biases + 4 * thread, __float_as_uint(bias ? bias[thread] : 0.0f));
    for (int task = thread; task < HEADS * 256; task += THREADS) {
        const int own = task / 256, k = task / 16 % 16 * 8;
        if (first_head + own < all_heads)
            place_matrix(matrices + own * MATRIX_BYTES,
                         matrix + (first_head + own) * HEAD_DIM * HEAD_DIM, k, task % 16);
    }
    for (int task = thread; task < HEADS * 128; task += THREADS) {
        const int own = task / 128, k = task / 8 % 16 * 8;
        if (first_head + own < all_heads)
            place_normalizer(matrices + own * MATRIX_BYTES,
                             normalizer + (first_head + own) * HEAD_DIM, k, task % 8, eps);
    }
    fence_async();
#endif
    __syncthreads();

    const int head_of_program = group % HEADS, head_of_all = first_head + head_of_program;
    if (head_of_all >= all_heads) return;
    const int batch = head_of_all / heads, head = head_of_all % heads;
    const int first_block = blockIdx.x * per_part + group / HEADS;
    const int last_block = min((blockIdx.x + 1) * per_part, blocks);
    const u32 weights = all_weights + head_of_program * 512;
    const u32 sums = all_sums + group * SUMS_BYTES;
    const u32 slots = ring + (4 * group + warp) * STAGES * SLOT_BYTES;
    const int own_token = 16 * warp + g;  // in a block; the other one is own_token + 8
    q += batch * q_batch + head * q_head + 8 * t;
    rstd += (long long)batch * length;
    cos += 4 * t, sin += 4 * t;

    auto request = [&](int block, int slot) {  // a lane reads what it has copied itself
        if (block < last_block) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int token = block * BLOCK + own_token + 8 * r;
                const bool exists = token < length;
                const u16 *source = q + (exists ? token * q_token : 0);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    copy_chunk(slots + slot * SLOT_BYTES + (2 * i + r) * 512 + lane * 16, source + 32 * i,
                               exists);
            }
        }
        commit_copies();
    };
#pragma unroll
    for (int n = 0; n < STAGES; n++) request(first_block + n * BLOCKS_AT_ONCE, n);

    int slot = 0, parity = 0;
#pragma unroll 1
    for (int block = first_block; block < last_block; block += BLOCKS_AT_ONCE) {
        const u32 source = slots + slot * SLOT_BYTES;
        const int token = block * BLOCK + own_token;
        const long long place = (long long)head_of_all * blocks + block;
        float x[2][4][8];
        wait_copies<STAGES - 1>();
#if ROTATION
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; r++) factor[r] = token + 8 * r < length ? __ldg(rstd + token + 8 * r) : 0.0f;
#endif
#pragma unroll
        for (int i = 0; i < 4; i++) {
#if ROTATION
            float w[8];
            load_shared(weights + 128 * i + 32 * t, w);
#endif
#pragma unroll
            for (int r = 0; r < 2; r++) {
                unpack(load_shared(source + (2 * i + r) * 512 + lane * 16), x[r][i]);
#if ROTATION
                const long long at = (long long)min(token + 8 * r, length - 1) * PAIRS + 16 * i;
                normalize_and_turn(x[r][i], factor[r], w, __ldg((const float4 *)(cos + at)),
                                   __ldg((const float4 *)(sin + at)));
#endif
            }
        }

        // The sums of tokens g and g + 8 pass through the slot just read, 8 rows of 128 floats, and
        // lane l adds those of channels 4l … 4l + 3. Odd rows exchange neighbouring 16 bytes.
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 bits[4];
#pragma unroll
                for (int n = 0; n < 4; n++)
                    bits[n] = __float_as_uint(x[0][i][4 * half + n] + x[1][i][4 * half + n]);
                store_shared(source + g * 512 + 128 * i + 32 * t + 16 * (half ^ (g & 1)), bits[0],
                             bits[1], bits[2], bits[3]);
            }
        __syncwarp();
        float total[4] = {};
#pragma unroll
        for (int row = 0; row < 8; row++) {
            const Chunk part = load_shared(source + row * 512 + 16 * (lane ^ (row & 1)));
#pragma unroll
            for (int n = 0; n < 4; n++) total[n] += __uint_as_float(part.pairs[n]);
        }
        __syncwarp();
        request(block + STAGES * BLOCKS_AT_ONCE, slot);
        if (++slot == STAGES) slot = 0;
        store_shared(sums + parity * 2048 + warp * 512 + 16 * lane, __float_as_uint(total[0]),
                     __float_as_uint(total[1]), __float_as_uint(total[2]), __float_as_uint(total[3]));

        float largest[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float amax = fabsf(x[r][0][0]);
            largest[r] = x[r][0][0];
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    amax = fmaxf(amax, fabsf(x[r][i][n]));
                    largest[r] = fmaxf(largest[r], x[r][i][n]);
                }
            const float step = fmaxf(quad_max(amax), 1e-8f) * (1.0f / 127.0f);
            const float per_step = 1.0f / step;
            largest[r] = quad_max(largest[r]);
            const int row = own_token + 8 * r;
            if (t == 0) q_scale[place * BLOCK + row] = step;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint4 rounded;
                rounded.x = to_int8(x[r][i], nullptr, per_step);
                rounded.y = to_int8(x[r][i] + 4, nullptr, per_step);
                rounded.z = to_int8(x[r][i + 2], nullptr, per_step);
                rounded.w = to_int8(x[r][i + 2] + 4, nullptr, per_step);
                *(uint4 *)(q_int8 + place * TILE_BYTES + swizzled(row, t + 4 * i)) = rounded;
            }
        }

        wait_for_warpgroup(group + 1);
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 4; n++)
            sum += load_shared_float(sums + parity * 2048 + n * 512 + 4 * (thread & 127));
        q_means[place * HEAD_DIM + (thread & 127)] = sum / min(BLOCK, length - block * BLOCK);
        parity ^= 1;

#if LINEAR
        u32 features[8][4];  // of each 16 channels, as the tensor cores take them
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int n = 0; n < 4; n++)
                    features[2 * i + (n >> 1)][2 * (n & 1) + r] =
                        pack_bf16(feature(x[r][i][2 * n], largest[r]),
                                  feature(x[r][i][2 * n + 1], largest[r]));
        float d[68];
        mma_fence();
#pragma unroll
        for (int step = 0; step < 8; step++)
            multiply(d, features[step],
                     descriptor(matrices + head_of_program * MATRIX_BYTES + (step >> 2) * HALF_BYTES +
                                32 * (step & 3), 1024),
                     step);
        mma_commit();
        mma_wait<0>();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (token + 8 * r >= length) continue;
            const float divisor = d[64 + 2 * r] + d[65 + 2 * r] + (MAP == 0 ? 0.0f : eps);
            const float factor = __fdividef(1.0f, divisor);
            u16 *target =
                branch + (((long long)batch * length + token + 8 * r) * heads + head) * HEAD_DIM + 8 * t;
#pragma unroll
            for (int m = 0; m < 4; m++) {
                float result[8];
                load_shared(biases + 128 * m + 32 * t, result);
#pragma unroll
                for (int n = 0; n < 8; n++)
                    result[n] = fmaf(d[16 * m + 4 * (n >> 1) + 2 * r + (n & 1)], factor, result[n]);
                *(Chunk *)(target + 32 * m) = pack(result);
            }
        }
#endif
    }
}
