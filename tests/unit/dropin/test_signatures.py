"""Callers written for upstream's wheel (0.3.13.post1) pass arguments as its signatures say.

`argN` is pybind's name of an argument that has none: such are taken by position only.
"""

import inspect

import pytest

import mooncake.engine as module

SIGNATURES = {
    "TransferEngine": """
        allocate_managed_buffer(arg0)
        batch_register_memory(buffer_addresses, capacities, location="*")
        batch_transfer_async(TARGETS, opcode, transport_hint="")
        batch_transfer_async_read(TARGETS, transport_hint="")
        batch_transfer_async_write(TARGETS, transport_hint="")
        batch_transfer_sync(TARGETS, opcode, notify=None, transport_hint="")
        batch_transfer_sync_read(TARGETS, transport_hint="")
        batch_transfer_sync_write(TARGETS, transport_hint="")
        batch_unregister_memory(arg0)
        free_managed_buffer(arg0, arg1)
        get_batch_transfer_status(arg0)
        get_engine()
        get_engine_ptr()
        get_first_buffer_address(arg0)
        get_local_topology(device_name=None)
        get_notifies()
        get_rpc_port()
        initialize(arg0, arg1, arg2, arg3)
        initialize_ext(arg0, arg1, arg2, arg3, arg4)
        read_bytes_from_buffer(arg0, arg1)
        register_memory(buffer_addr, capacity, location="*")
        send_probe(peer_server_name)
        transfer_check_status(arg0)
        transfer_submit_write(TARGET, transport_hint="")
        transfer_sync(TARGET, opcode, notify=None, transport_hint="")
        transfer_sync_read(TARGET, transport_hint="")
        transfer_sync_write(TARGET, transport_hint="")
        unregister_memory(arg0)
        warmup_efa_segment(segment_name)
        write_bytes_to_buffer(arg0, arg1, arg2)
    """,
    "RpcInterface": """
        initialize(listen_address="", thread_count=0, timeout_seconds=30, pool_size=100)
        initialize_client(pool_size=100, timeout_seconds=30)
        initialize_server(listen_address, thread_count=8, timeout_seconds=30)
        send_data(target_address, data)
        send_data_async(target_address, data, loop)
        send_tensor(target_address, tensor)
        send_tensor_async(target_address, tensor, loop)
        set_data_receive_callback(arg0)
        set_tensor_receive_callback(arg0)
        start_server()
        start_server_async()
        stop_server()
    """,
    "SharedSegment": """
        base_addr()
        complete(blobs)
        create(name, size, world_size, rank_id, owner_rank=0, device_id=0, mmap=True, host_register=False)
        device_addr()
        ready()
        size()
        supported(mmap=True, host_register=False)
    """,
}
SHORT = {
    "TARGETS": "target_hostname, buffers, peer_buffer_addresses, lengths",
    "TARGET": "target_hostname, buffer, peer_buffer_address, length",
}
CASES = [
    (name, line.strip()) for name, lines in SIGNATURES.items() for line in lines.split("\n") if line.strip()
]


def call_of(function: object, name: str) -> str:
    """Return how `function` is called, in upstream's way of writing it."""
    parts = []
    for parameter in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if parameter.name == "self":
            continue
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            parts.append(f"arg{len(parts)}")
        elif parameter.default is inspect.Parameter.empty:
            parts.append(parameter.name)
        else:
            default = f'"{parameter.default}"' if isinstance(parameter.default, str) else parameter.default
            parts.append(f"{parameter.name}={default}")
    return f"{name}({', '.join(parts)})"


@pytest.mark.parametrize(
    ("owner", "call"), CASES, ids=[f"{owner}.{call.partition('(')[0]}" for owner, call in CASES]
)
def test_every_method_of_upstream_is_called_as_upstream_s(owner: str, call: str) -> None:
    for short, names in SHORT.items():
        call = call.replace(f"({short},", f"({names},")
    name = call.partition("(")[0]
    assert call_of(getattr(getattr(module, owner), name), name) == call
