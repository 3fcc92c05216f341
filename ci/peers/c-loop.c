// One queue pair, connected to itself, on the first device: post a receive, post a 64-byte send, poll both completions.
// usage: c-loop ITERATIONS
#include <infiniband/verbs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { SIZE = 64, DEPTH = 64, BATCH = 16 };

static void check(int ok, const char *what) {
    if (!ok) {
        perror(what);
        exit(1);
    }
}

// Not inlined, so that its own instructions can be told from the set-up's.
__attribute__((noinline)) static uint64_t measured(struct ibv_qp *qp, struct ibv_cq *cq, struct ibv_mr *mr, uint64_t iterations) {
    uint64_t received = 0;
    for (uint64_t i = 0; i < iterations; i++) {
        struct ibv_sge in = {.addr = (uintptr_t)mr->addr, .length = SIZE, .lkey = mr->lkey};
        struct ibv_sge out = {.addr = (uintptr_t)mr->addr + SIZE, .length = SIZE, .lkey = mr->lkey};
        struct ibv_recv_wr recv = {.wr_id = 2 * i, .sg_list = &in, .num_sge = 1}, *bad_recv;
        struct ibv_send_wr send = {
            .wr_id = 2 * i + 1, .sg_list = &out, .num_sge = 1, .opcode = IBV_WR_SEND, .send_flags = IBV_SEND_SIGNALED};
        struct ibv_send_wr *bad_send;
        check(ibv_post_recv(qp, &recv, &bad_recv) == 0, "ibv_post_recv");
        check(ibv_post_send(qp, &send, &bad_send) == 0, "ibv_post_send");
        for (int completed = 0; completed < 2;) {
            struct ibv_wc wc[BATCH];
            int n = ibv_poll_cq(cq, BATCH, wc);
            check(n >= 0, "ibv_poll_cq");
            for (int k = 0; k < n; k++) {
                check(wc[k].status == IBV_WC_SUCCESS, "a completion");
                if (wc[k].opcode == IBV_WC_RECV)
                    received += wc[k].byte_len;
            }
            completed += n;
        }
    }
    return received;
}

int main(int argc, char **argv) {
    uint64_t iterations = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000;
    struct ibv_device **devices = ibv_get_device_list(NULL);
    check(devices && devices[0], "ibv_get_device_list");
    struct ibv_context *context = ibv_open_device(devices[0]);
    check(context != NULL, "ibv_open_device");
    struct ibv_pd *pd = ibv_alloc_pd(context);
    static char memory[2 * SIZE];
    struct ibv_mr *mr = ibv_reg_mr(pd, memory, sizeof memory, IBV_ACCESS_LOCAL_WRITE);
    struct ibv_cq *cq = ibv_create_cq(context, 2 * DEPTH, NULL, NULL, 0);
    struct ibv_qp_init_attr init = {
        .send_cq = cq,
        .recv_cq = cq,
        .qp_type = IBV_QPT_RC,
        .cap = {.max_send_wr = DEPTH, .max_recv_wr = DEPTH, .max_send_sge = 1, .max_recv_sge = 1}};
    struct ibv_qp *qp = ibv_create_qp(pd, &init);
    check(pd && mr && cq && qp, "set-up");

    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1};
    check(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS), "INIT");
    union ibv_gid gid;
    check(!ibv_query_gid(context, 1, 1, &gid), "ibv_query_gid");
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTR,
        .path_mtu = IBV_MTU_1024,
        .dest_qp_num = qp->qp_num,
        .max_dest_rd_atomic = 1,
        .min_rnr_timer = 12,
        .ah_attr = {.is_global = 1, .port_num = 1, .grh = {.dgid = gid, .sgid_index = 1, .hop_limit = 64}}};
    check(!ibv_modify_qp(qp, &attr,
                         IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                             IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER),
          "RTR");
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 6, .rnr_retry = 7, .max_rd_atomic = 1};
    check(!ibv_modify_qp(qp, &attr,
                         IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                             IBV_QP_MAX_QP_RD_ATOMIC),
          "RTS");

    uint64_t received = measured(qp, cq, mr, iterations);
    check(received == iterations * SIZE, "bytes received");
    check(!ibv_destroy_qp(qp) && !ibv_destroy_cq(cq) && !ibv_dereg_mr(mr) && !ibv_dealloc_pd(pd), "tear-down");
    check(!ibv_close_device(context), "ibv_close_device");
    ibv_free_device_list(devices);
    printf("%llu bytes received\n", (unsigned long long)received);
    return 0;
}
