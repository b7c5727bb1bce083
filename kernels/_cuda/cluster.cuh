// Copies through tensor maps, and clusters of programs that share them, on Hopper (sm_90a).
//
// The same offset in the shared memory of another program of a cluster is reached by its rank.

struct __align__(64) TensorMap {
    u64 words[16];
};

// Arrives at the same barrier of the program of that rank in the cluster. Orders what the own program
// sees only: for all of the cluster, every thread would wait for its stores to global memory.
DEVICE void barrier_arrive(u32 barrier, u32 rank) {
    asm volatile(
        "{\n.reg .u32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Every thread of every program of the cluster.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The same in two halves, of which the first lets no store be waited for.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

DEVICE void prefetch_map(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies a box of a matrix to `target` of every program in `ranks`, a bit each; its bytes count for
// the same barrier of each of them. What lies outside the matrix is zero, and counts.
DEVICE void copy_box(u32 target, const TensorMap &map, int x, int y, u32 barrier, u16 ranks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
        "l"(&map), "r"(x), "r"(y), "r"(barrier), "h"(ranks)
        : "memory");
}

DEVICE void copy_box(u32 target, const TensorMap &map, int x, int y, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];" ::"r"(target),
        "l"(&map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}

// As above, of five dimensions, the middle ones from their start.
DEVICE void copy_box_5d(u32 target, const TensorMap &map, int first, int last, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %3, %3, %4}], [%5];" ::"r"(target),
        "l"(&map), "r"(first), "r"(0), "r"(last), "r"(barrier)
        : "memory");
}
