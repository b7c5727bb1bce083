// What the kernels for Hopper's tensor cores share (sm_90a): barriers in shared memory, matrix
// descriptors, the order of asynchronous products.
//
// Shared memory is addressed by 32-bit integers in the window of the own program.

typedef unsigned char u8;

DEVICE u32 shared_address(const void *pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}

// A number that is the same in all lanes of a warp, so that the compiler knows.
DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Shows initialized barriers to the other programs of the cluster and to the copy engine.
DEVICE void barriers_are_initialized() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

DEVICE bool barrier_has_passed(u32 barrier, u32 parity) {
    u32 passed;
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}\n"
        : "=r"(passed)
        : "r"(barrier), "r"(parity)
        : "memory");
    return passed;
}

// Waits for the phase of that parity to end; a new barrier counts as having ended one of parity 1.
// With -DDEBUG a wait that lasts for ever ends the kernel with an error: others take microseconds.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
#ifdef DEBUG
    for (int tries = 0; !barrier_has_passed(barrier, parity); tries++)
        if (tries == 1 << 24) __trap();
#else
    while (!barrier_has_passed(barrier, parity)) {}
#endif
}

// Arrives, and lets the phase end only when so many bytes have been copied.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Arrives at a barrier of the own program.
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Copies so many bytes, in order; the barrier's phase ends when they are there.
DEVICE void copy_tile(u32 target, const void *source, u32 bytes, u32 barrier) {
    barrier_expect(barrier, bytes);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            target),
        "l"(source), "r"(bytes), "r"(barrier)
        : "memory");
}

// All threads of a warpgroup, by a barrier of that number other than 0.
DEVICE void wait_for_warpgroup(int barrier) {
    asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}

// Shared memory written before is seen by the tensor cores and the copy engine after a barrier.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A matrix descriptor of a tile with rows of 128 bytes, 128-byte swizzle, 8 rows to a group. `leading`
// is the distance of 64 columns from the next 64 where rows lie along the sum's axis; else unused.
DEVICE u64 descriptor(u32 address, u32 leading = 16) {
    return (u64)((address & 0x3FFFF) >> 4) | ((u64)(leading >> 4) << 16) |
           ((u64)(1024 >> 4) << 32) | ((u64)1 << 62);
}

// That of a tile so many bytes further on, or of other columns.
DEVICE u64 moved(u64 descriptor, u32 bytes) { return descriptor + (bytes >> 4); }

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

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Over the four lanes that hold a row of a product.
DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Moves registers between the warpgroups of a program: all threads of a warpgroup call.
template <int REGISTERS> DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
