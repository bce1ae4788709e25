"""The wire format of ADB: packets, the shell protocol inside them, and the keys that connections prove.

Pure functions and values; nothing here reads or writes.
"""

from __future__ import annotations

import base64
import binascii
import struct
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

HEADER = struct.Struct("<6I")
WITH_CHECKSUM = 0x01000000
WITHOUT_CHECKSUM = 0x01000001
MAX_PAYLOAD_OLD_BYTES = 4096
MAX_PAYLOAD_BYTES = 1 << 20

CNXN, AUTH, OPEN, OKAY, CLSE, WRTE = (
    int.from_bytes(name, "little") for name in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"CLSE", b"WRTE")
)
COMMANDS = {CNXN: "CNXN", AUTH: "AUTH", OPEN: "OPEN", OKAY: "OKAY", CLSE: "CLSE", WRTE: "WRTE"}

AUTH_TOKEN, AUTH_SIGNATURE, AUTH_PUBLIC_KEY = 1, 2, 3
TOKEN_BYTES = 20

SHELL_HEADER = struct.Struct("<BI")
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN, WINDOW_SIZE = range(6)

KEY_WORDS = 64  # of 32 bits: a modulus of 2048 bits
KEY_HEADER = struct.Struct("<II")
KEY_BYTES = KEY_HEADER.size + 2 * 4 * KEY_WORDS + 4


class ProtocolError(Exception):
    """What came is no ADB; the connection cannot go on."""


@dataclass(frozen=True)
class Packet:
    """One message. `arg0` is the sender's name of a stream and `arg1` the receiver's, in messages about streams."""

    command: int
    arg0: int = 0
    arg1: int = 0
    payload: bytes = b""

    def __str__(self) -> str:
        return f"{COMMANDS.get(self.command, hex(self.command))}({self.arg0:#x}, {self.arg1:#x}, {self.payload[:60]!r})"


def checksum(payload: bytes) -> int:
    """The sum of the bytes, of 32 bits."""
    return sum(payload) & 0xFFFFFFFF


def pack(packet: Packet, version: int) -> bytes:
    """The bytes of a packet. From version 0x01000001 on no checksum is sent."""
    summed = checksum(packet.payload) if version < WITHOUT_CHECKSUM else 0
    return (
        HEADER.pack(
            packet.command, packet.arg0, packet.arg1, len(packet.payload), summed, packet.command ^ 0xFFFFFFFF
        )
        + packet.payload
    )  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What precedes a payload."""

    command: int
    arg0: int
    arg1: int
    length: int
    checksum: int


def unpack_header(data: bytes, limit_bytes: int) -> Header:
    """The header in 24 bytes. Raises ProtocolError where it is none, or announces more than `limit_bytes`."""
    command, arg0, arg1, length, summed, magic = HEADER.unpack(data)
    if magic != command ^ 0xFFFFFFFF or command not in COMMANDS:
        raise ProtocolError(f"no header of a packet: {data.hex()}")
    if length > limit_bytes:
        raise ProtocolError(f"{COMMANDS[command]} of {length} bytes, where {limit_bytes} are allowed")
    return Header(command, arg0, arg1, length, summed)


def complete(header: Header, payload: bytes, version: int) -> Packet:
    """The packet of a header and its payload. Raises ProtocolError where a checksum is due and wrong."""
    if version < WITHOUT_CHECKSUM and header.checksum != checksum(payload):
        raise ProtocolError(f"{COMMANDS[header.command]}: wrong checksum {header.checksum:#x}")
    return Packet(header.command, header.arg0, header.arg1, payload)


def shell_packet(kind: int, data: bytes) -> bytes:
    """One packet of the shell protocol, version 2."""
    return SHELL_HEADER.pack(kind, len(data)) + data


@dataclass
class ShellParser:
    """Cuts what a client sends in the shell protocol into packets, however it arrives."""

    pending: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The packets that are complete by now, as (kind, data)."""
        self.pending += data
        found = []
        while len(self.pending) >= SHELL_HEADER.size:
            kind, length = SHELL_HEADER.unpack_from(self.pending)
            end = SHELL_HEADER.size + length
            if len(self.pending) < end:
                break
            found.append((kind, bytes(self.pending[SHELL_HEADER.size : end])))
            del self.pending[:end]
        return found


def public_key(line: bytes) -> rsa.RSAPublicKey:
    """The key in a line of `adbkey.pub`: 524 bytes in base 64, then the name of its owner.

    The bytes are Android's structure: length in words, -1/n mod 2^32, n, R^2 mod n, exponent, all little-endian.
    Raises ProtocolError where it is none.
    """
    try:
        data = base64.b64decode(line.rstrip(b"\0\n").split(b" ")[0], validate=True)
    except binascii.Error as error:
        raise ProtocolError(f"the public key is no base 64: {error}") from error
    if len(data) != KEY_BYTES or KEY_HEADER.unpack_from(data)[0] != KEY_WORDS:
        raise ProtocolError(f"a public key of {len(data)} bytes, where {KEY_BYTES} are needed")
    modulus = int.from_bytes(data[KEY_HEADER.size : KEY_HEADER.size + 4 * KEY_WORDS], "little")
    exponent = int.from_bytes(data[-4:], "little")
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError as error:
        raise ProtocolError(f"no RSA key: {error}") from error


def signed(key: rsa.RSAPublicKey, token: bytes, signature: bytes) -> bool:
    """Whether the signature (PKCS #1 v1.5, the token in place of a SHA-1 digest) was made with this key."""
    try:
        key.verify(signature, token, padding.PKCS1v15(), Prehashed(hashes.SHA1()))
    except InvalidSignature:
        return False
    return True
