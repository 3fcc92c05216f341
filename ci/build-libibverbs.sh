#!/usr/bin/env bash
# Builds the drop-in form of rdma-preload: a libibverbs.so.1 whose only device is soft0.
# usage: ci/build-libibverbs.sh [FOLDER]      default: target/drop-in; then: LD_LIBRARY_PATH=FOLDER PROGRAM
. "$(dirname "$0")/lib.sh"

out=${1:-target/drop-in}
mkdir -p "$out"
target=${CARGO_TARGET_DIR:-target}
cargo rustc --release --locked -p rdma-preload --lib --features drop-in --crate-type staticlib

# Providers bind to a private node whose number differs between releases: take the one that the installed ones ask for.
private=$(for library in /usr/lib/*/librdmacm.so.1 /usr/lib/*/libmlx5.so.1; do
  [ -e "$library" ] && objdump -T "$library" 2>/dev/null | grep -o 'IBVERBS_PRIVATE_[0-9]*'
done | sort -u | head -n 1 || true)
private=${private:-IBVERBS_PRIVATE_34}

map=$(mktemp)
trap 'rm -f "$map"' EXIT
python3 - "$private" >"$map" <<'PY'
import sys
nodes = {
 "IBVERBS_1.0": "ibv_create_comp_channel ibv_destroy_comp_channel ibv_get_sysfs_path ibv_read_sysfs_file ibv_rate_to_mult mult_to_ibv_rate ibv_copy_path_rec_from_kern ibv_copy_path_rec_to_kern ibv_copy_qp_attr_from_kern",
 "IBVERBS_1.1": "ibv_get_device_list ibv_free_device_list ibv_get_device_name ibv_get_device_guid ibv_open_device ibv_close_device ibv_get_async_event ibv_ack_async_event ibv_query_device ibv_query_port ibv_query_gid ibv_query_pkey ibv_alloc_pd ibv_dealloc_pd ibv_reg_mr ibv_rereg_mr ibv_dereg_mr ibv_create_cq ibv_resize_cq ibv_destroy_cq ibv_get_cq_event ibv_ack_cq_events ibv_create_srq ibv_modify_srq ibv_query_srq ibv_destroy_srq ibv_create_qp ibv_query_qp ibv_modify_qp ibv_destroy_qp ibv_create_ah ibv_destroy_ah ibv_attach_mcast ibv_detach_mcast ibv_wc_status_str ibv_node_type_str ibv_port_state_str ibv_event_type_str ibv_fork_init ibv_dontfork_range ibv_dofork_range ibv_init_ah_from_wc ibv_create_ah_from_wc ibv_copy_ah_attr_from_kern ibv_rate_to_mbps mbps_to_ibv_rate ibv_resolve_eth_l2_from_gid",
 "IBVERBS_1.5": "ibv_get_pkey_index",
 "IBVERBS_1.6": "ibv_qp_to_qp_ex",
 "IBVERBS_1.7": "ibv_reg_mr_iova",
 "IBVERBS_1.8": "ibv_reg_mr_iova2",
 "IBVERBS_1.9": "ibv_get_device_index",
 "IBVERBS_1.10": "ibv_import_device ibv_import_pd ibv_unimport_pd ibv_import_mr ibv_unimport_mr ibv_set_ece ibv_query_ece",
 "IBVERBS_1.11": "_ibv_query_gid_ex _ibv_query_gid_table",
 "IBVERBS_1.12": "ibv_reg_dmabuf_mr",
 "IBVERBS_1.13": "ibv_import_dm ibv_unimport_dm ibv_is_fork_initialized",
 "IBVERBS_1.14": "ibv_query_qp_data_in_order",
}
previous = ""
for node, names in nodes.items():
    print(node, "{ global:", "; ".join(names.split()) + ";", "local: *;" if not previous else "", "}" + previous + ";")
    previous = " " + node
print(sys.argv[1], "{ global: ibv_cmd_*; ibv_query_gid_type; ibv_read_ibdev_sysfs_file; __verbs_log; __ioctl_final_num_attrs; "
      "_verbs_init_and_alloc_context; execute_ioctl; verbs_*; };")
PY

cc -shared -o "$out/libibverbs.so.1" -Wl,-soname,libibverbs.so.1 -Wl,--version-script="$map" -Wl,--gc-sections -Wl,--strip-debug \
  -Wl,--whole-archive "$target/release/librdma_preload.a" -Wl,--no-whole-archive -lpthread -ldl -lm -lgcc_s -lc
ln -sf libibverbs.so.1 "$out/libibverbs.so"
echo "$out/libibverbs.so.1: $(objdump -T "$out/libibverbs.so.1" | grep -c ' IBVERBS_') versioned symbols, private node $private"
