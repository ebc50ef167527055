"""Host names, asked without holding up anything."""

import asyncio
import socket
import subprocess
import sys
import textwrap

import pytest

from mooncake.core.names import address_infos

END_S = 60.0
"""A process that waited for its question would take an hour."""


async def test_a_name_has_addresses_that_can_be_connected_to() -> None:
    async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        found = await address_infos("localhost", port)
        (address,) = {one[4] for one in found if one[0] == socket.AF_INET}
        _, writer = await asyncio.open_connection(*address)
        writer.close()


@pytest.mark.parametrize("host", ["nobody.invalid", "a..b", "\udcff"])
async def test_what_is_no_name_is_told(host: str) -> None:
    with pytest.raises((OSError, UnicodeError)):
        await address_infos(host, 80)


@pytest.mark.parametrize("run", ["asyncio.run", "uvloop.run"])
def test_a_process_ends_while_the_name_server_is_silent(run: str) -> None:
    program = """
        import asyncio, socket, sys, time, uvloop
        from mooncake.core.metadata_etcd_names import Names
        from mooncake.core.metadata_etcd_options import Endpoint

        socket.getaddrinfo = lambda *_, **__: time.sleep(3600)

        async def main():
            names = Names()
            try:
                async with asyncio.timeout(0.1):
                    await names.addresses(Endpoint("etcd", 2379))
            except TimeoutError:
                await names.close()
                sys.stdout.write("ends")

        RUN(main())
        """
    words = [sys.executable, "-c", textwrap.dedent(program).replace("RUN", run)]
    assert subprocess.run(words, capture_output=True, timeout=END_S, check=True).stdout == b"ends"
