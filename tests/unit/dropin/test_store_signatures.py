"""Callers written for upstream's wheel (0.3.13.post1) pass arguments to the store as its signatures say."""

import inspect

import pytest

from mooncake.store import MooncakeDistributedStore

SIGNATURES = """
    alloc_from_mem_pool(arg0)
    allocate_and_mount_segment(size, protocol="tcp", location="")
    batch_get_buffer(arg0)
    batch_get_into(keys, buffer_ptrs, sizes)
    batch_get_into_multi_buffer_ranges(keys, all_buffer_ptrs, all_sizes, all_src_offsets)
    batch_get_into_multi_buffers(keys, all_buffer_ptrs, all_sizes, prefer_alloc_in_same_node=False)
    batch_get_replica_desc(keys)
    batch_get_session_end(keys)
    batch_get_session_start(keys)
    batch_get_tensor(keys)
    batch_get_tensor_into(keys, buffer_ptrs, sizes)
    batch_get_tensor_into_cuda(keys, tensors_list)
    batch_get_tensor_with_parallelism(keys, targets=None)
    batch_get_tensor_with_parallelism_into(keys, buffer_ptrs, sizes, targets=None)
    batch_get_tensor_with_tp(base_keys, tp_rank=0, tp_size=1)
    batch_get_tensor_with_tp_into(base_keys, buffer_ptrs, sizes, tp_rank=0, tp_size=1)
    batch_is_exist(keys)
    batch_pub_tensor(keys, tensors_list, config=None)
    batch_pub_tensor_with_tp(base_keys, tensors_list, config=None, tp_rank=0, tp_size=1, split_dim=0)
    batch_put_from(keys, buffer_ptrs, sizes, config=None)
    batch_put_from_multi_buffer_ranges(keys, all_buffer_ptrs, all_sizes, all_dst_offsets)
    batch_put_from_multi_buffers(keys, all_buffer_ptrs, all_sizes, config=None)
    batch_put_session_end(keys)
    batch_put_session_revoke(keys)
    batch_put_session_start(keys, sizes, config=None)
    batch_put_tensor(keys, tensors_list)
    batch_put_tensor_from(keys, buffer_ptrs, sizes)
    batch_put_tensor_with_parallelism(keys, tensors_list, parallelisms=None, config=None, \
writer_partitions=None)
    batch_put_tensor_with_parallelism_from(keys, buffer_ptrs, sizes, parallelisms=None, config=None, \
writer_partitions=None)
    batch_put_tensor_with_tp(base_keys, tensors_list, tp_rank=0, tp_size=1, split_dim=0)
    batch_put_tensor_with_tp_from(base_keys, buffer_ptrs, sizes, tp_rank=0, tp_size=1, split_dim=0)
    batch_remove(keys, force=False)
    batch_replica_clear(keys, segment_name="")
    batch_upsert_from(keys, buffer_ptrs, sizes, config=None)
    batch_upsert_pub_tensor(keys, tensors_list, config=None)
    batch_upsert_tensor(keys, tensors_list)
    batch_upsert_tensor_from(keys, buffer_ptrs, sizes)
    batch_upsert_tensor_with_parallelism(keys, tensors_list, parallelisms=None, config=None, \
writer_partitions=None)
    batch_upsert_tensor_with_parallelism_from(keys, buffer_ptrs, sizes, parallelisms=None, config=None, \
writer_partitions=None)
    close()
    create_copy_task(key, targets)
    create_move_task(key, source, target)
    get(arg0)
    get_batch(arg0)
    get_buffer(arg0)
    get_hostname()
    get_into(key, buffer_ptr, size)
    get_into_ranges(buffer_ptrs, all_keys, all_dst_offsets, all_src_offsets, all_sizes)
    get_offload_rpc_read_count()
    get_replica_desc(key)
    get_size(arg0)
    get_tensor(key)
    get_tensor_into(key, buffer_ptr, size)
    get_tensor_into_cuda(key, tensor)
    get_tensor_with_parallelism(key, target=None)
    get_tensor_with_parallelism_into(key, buffer_ptr, size, target=None)
    get_tensor_with_tp(key, tp_rank=0, tp_size=1, split_dim=0)
    get_tensor_with_tp_into(key, buffer_ptr, size, tp_rank=0, tp_size=1, split_dim=0)
    health_check()
    init_all(arg0, arg1, arg2)
    is_exist(arg0)
    mount_segment(path, size, offset=0, protocol="tcp", location="")
    load_tensor_from_safetensor(key=None, file_name="")
    pub_tensor(key, tensor, config=None)
    pub_tensor_with_tp(key, tensor, config=None, tp_rank=0, tp_size=1, split_dim=0)
    put(key, value, config=None)
    put_batch(keys, values, config=None)
    put_from(key, buffer_ptr, size, config=None)
    put_from_with_metadata(key, buffer_ptr, metadata_buffer_ptr, size, metadata_size, config=None)
    put_parts(key, *args, config=None)
    put_tensor(key, tensor)
    put_tensor_from(key, buffer_ptr, size)
    put_tensor_with_parallelism(key, tensor, parallelism=None, config=None, writer_partition=None)
    put_tensor_with_parallelism_from(key, buffer_ptr, size, parallelism=None, config=None, \
writer_partition=None)
    put_tensor_with_tp(key, tensor, tp_rank=0, tp_size=1, split_dim=0)
    put_tensor_with_tp_from(key, buffer_ptr, size, tp_rank=0, tp_size=1, split_dim=0)
    query_task(task_id)
    register_buffer(buffer_ptr, size)
    remove(key, force=False)
    remove_all(force=False)
    remove_by_regex(regex_pattern, force=False)
    save_tensor_to_safetensor(key, file_name=None)
    setup(local_hostname, metadata_server, global_segment_size, local_buffer_size, protocol, rdma_devices, \
master_server_addr, engine, enable_ssd_offload, ssd_offload_path, tenant_id, enable_client_http_server, \
client_http_port, config)
    setup_dummy(mem_pool_size, local_buffer_size, server_address)
    unmount_and_free_segment(segment_ids, grace_period_seconds=0)
    unmount_local_disk_segment(grace_period_seconds=0)
    unmount_segment(segment_ids, grace_period_seconds=0)
    unregister_buffer(buffer_ptr)
    upsert(key, value, config=None)
    upsert_batch(keys, values, config=None)
    upsert_from(key, buffer_ptr, size, config=None)
    upsert_parts(key, *args, config=None)
    upsert_pub_tensor(key, tensor, config=None)
    upsert_tensor(key, tensor)
    upsert_tensor_from(key, buffer_ptr, size)
    upsert_tensor_with_parallelism(key, tensor, parallelism=None, config=None, writer_partition=None)
    upsert_tensor_with_parallelism_from(key, buffer_ptr, size, parallelism=None, config=None, \
writer_partition=None)
"""
CALLS = [line.strip() for line in SIGNATURES.strip().splitlines()]


def written(name: str) -> str:
    """Return how a method is called; setup's defaults, which only the dict form needs, left out."""
    parameters = list(inspect.signature(getattr(MooncakeDistributedStore, name)).parameters.values())[1:]
    texts = []
    for one in parameters:
        star = "*" if one.kind is one.VAR_POSITIONAL else ""
        has_default = one.default is not one.empty and name != "setup"
        default = f'="{one.default}"' if isinstance(one.default, str) else f"={one.default}"
        texts.append(f"{star}{one.name}{default if has_default else ''}")
    return f"{name}({', '.join(texts)})"


@pytest.mark.parametrize("call", CALLS)
def test_a_method_is_called_as_upstream_s(call: str) -> None:
    assert written(call.partition("(")[0]) == call


def test_there_is_nothing_else() -> None:
    public = {name for name in dir(MooncakeDistributedStore) if not name.startswith("_")}
    assert public == {call.partition("(")[0] for call in CALLS}
