#!/usr/bin/env python3
"""Reads a .snap file from its description alone: docs/format.md, not snap's source.

    reader.py FILE

Checks every checksum and every rule of the format that a file without a parent is subject to, then
prints JSON: the regions, the states, and of each page that is not zero the SHA-256 in "pages". It
knows the codec raw; pages of other codecs have their chunks checked and are listed as "not_decoded".
A file that breaks a rule: the rule on stderr, exit code 1.
"""

import hashlib
import json
import struct
import sys
import uuid
import zlib

MAGIC = b"\x89SNAP\r\n\x1a"
PAGE = 4096
CHUNKS, INDEX_LEAVES, INDEX_ROOT, MEMORY_MAP, STATE, METADATA = 1, 2, 3, 4, 5, 6
ZERO, DATA = 0, 1
BOUND = 2
CODECS = ("raw", "lz4", "zstd")


class Broken(Exception):
    """A rule of the format that the file does not keep."""


def rule(kept, text):
    if not kept:
        raise Broken(text)


def words(layout, data, offset=0):
    return struct.unpack_from("<" + layout, data, offset)


def read_header(data):
    rule(data[:8] == MAGIC, "magic")
    rule(len(data) >= 4096, "the header is 4096 bytes")
    rule(zlib.crc32(data[:4092]) == words("I", data, 4092)[0], "header_crc")
    version, header_bytes, incompat, _, _ = words("IIQQQ", data, 8)
    rule(version == 1, "version 1")
    rule(incompat & ~BOUND == 0, "incompat: no feature that this reader lacks")
    names = ("memory_bytes file_bytes table_offset table_records table_crc "
             "data_pages stored_pages parent_pages chunks created_unix_ms").split()
    header = dict(zip(names, words("QQQIIQQQQQ", data, 80)))
    header["id"] = str(uuid.UUID(bytes=data[40:56]))
    rule(header["file_bytes"] == len(data), "file_bytes")
    page_bytes, header["chunk_pages"] = words("II", data, 72)
    rule(header_bytes == 4096 and page_bytes == PAGE, "header_bytes, page_bytes")
    rule(1 <= header["chunk_pages"] <= 512, "chunk_pages")
    memory = header["memory_bytes"]
    rule(0 < memory <= 1 << 44 and memory % PAGE == 0, "memory_bytes")
    rule(1 <= header["table_records"] <= 64, "table_records")
    rule(header["table_offset"] == len(data) - 40 * header["table_records"], "table_offset")
    rule(header["table_offset"] >= 4096, "the table does not overlap the header")
    bound = incompat & BOUND != 0
    rule(not any(data[168 if bound else 152:4092]), "reserved bytes of the header")
    header["chunks_id"] = str(uuid.UUID(bytes=data[152:168])) if bound else None
    return header


def read_table(data, header):
    table = data[header["table_offset"]:]
    rule(zlib.crc32(table) == header["table_crc"], "table_crc")
    sections, free_from = [], 4096
    for at in range(0, len(table), 40):
        kind, tag, version, crc, offset, length, reserved = words("IIIIQQQ", table, at)
        rule(reserved == 0, "reserved bytes of a section record")
        rule(offset >= free_from, "sections ascend and do not overlap")
        rule(offset + length <= header["table_offset"], "a section ends before the table")
        rule(not any(data[free_from:offset]), "padding before a section")
        if kind not in (CHUNKS, INDEX_LEAVES):
            rule(zlib.crc32(data[offset:offset + length]) == crc, f"crc of section kind {kind}")
        free_from = offset + length
        sections.append((kind, tag, version, offset, length))
    rule(not any(data[free_from:header["table_offset"]]), "padding before the table")
    return sections


def only(sections, kind):
    found = [section for section in sections if section[0] == kind]
    rule(len(found) == 1, f"one section of kind {kind}")
    return found[0][3], found[0][4]


def read_regions(data, sections, memory_bytes):
    offset, length = only(sections, MEMORY_MAP)
    rule(length % 24 == 0 and length <= 24 * max(1024, memory_bytes >> 21), "length of the memory map")
    regions, gpa_from, source_from = [], 0, 0
    for at in range(offset, offset + length, 24):
        gpa, size, source = words("QQQ", data, at)
        rule(gpa % PAGE == 0 and size % PAGE == 0 and size > 0, "a region is whole pages")
        rule(gpa >= gpa_from, "regions ascend without overlap")
        rule(source == source_from, "a region's source offset")
        gpa_from, source_from = gpa + size, source + size
        regions.append({"gpa": gpa, "len": size})
    rule(source_from == memory_bytes, "the regions make up memory_bytes")
    return regions


def read_entries(data, sections, memory_bytes):
    """Page number -> (offset of its chunk, length of its chunk, slot)."""
    root, root_length = only(sections, INDEX_ROOT)
    leaves, leaves_length = only(sections, INDEX_LEAVES)
    chunks, chunks_length = only(sections, CHUNKS)
    rule(root_length % 8 == 0, "length of the index root")
    rule(leaves_length == root_length // 8 * 4096, "length of the index leaves")
    entries, least = {}, 0
    for at in range(root_length // 8):
        number, crc = words("II", data, root + 8 * at)
        rule(number >= least, "leaf numbers ascend")
        rule(512 * number < memory_bytes // PAGE, "a leaf is inside memory")
        least = number + 1
        leaf = data[leaves + 4096 * at:leaves + 4096 * (at + 1)]
        rule(zlib.crc32(leaf) == crc, f"crc of leaf {number}")
        for position, entry in enumerate(words("512Q", leaf)):
            kind = entry & 7
            if kind == ZERO:
                rule(entry == 0, "an entry of kind zero is zero")
                continue
            rule(kind == DATA, "the kind of an entry")
            page = 512 * number + position
            slot, units, offset = entry >> 3 & 511, entry >> 12 & 0xFFFF, entry >> 28
            offset, length = 64 * offset, 64 * (units + 1)
            inside = chunks <= offset and offset + length <= chunks + chunks_length
            rule(inside, "an entry's chunk is inside the chunks section")
            if page < memory_bytes // PAGE:
                entries[page] = offset, length, slot
    return entries


def read_chunks(data, sections, chunk_pages, chunks_id):
    """Offset -> (length, page list, codec, payload)."""
    seed = zlib.crc32(uuid.UUID(chunks_id).bytes) if chunks_id else 0
    at, length = only(sections, CHUNKS)
    end, chunks = at + length, {}
    while at < end:
        rule(end - at >= 32, "chunks fill their section")
        magic, codec, reserved, pages, payload_bytes, body_crc, place, reserved_too, crc = \
            words("4sBBHIIQII", data, at)
        rule(magic == b"CHNK", "magic of a chunk")
        rule(at % 64 == 0, "a chunk starts at a multiple of 64")
        rule(zlib.crc32(data[at:at + 28]) == crc, f"chunk_crc at {at}")
        rule(place == at, "a chunk knows its place")
        rule(reserved == 0 and reserved_too == 0, "reserved bytes of a chunk header")
        rule(codec < len(CODECS), "codec")
        rule(1 <= pages <= min(512, chunk_pages), "pages of a chunk")
        rule(1 <= payload_bytes <= PAGE * pages, "payload_bytes")
        rule(codec != 0 or payload_bytes == PAGE * pages, "payload_bytes of a raw chunk")
        list_end = at + 32 + 4 * pages
        payload_end = list_end + payload_bytes
        chunk_end = (payload_end + 63) // 64 * 64
        rule(chunk_end <= end, "a chunk is inside its section")
        rule(zlib.crc32(data[at + 32:chunk_end], seed) == body_crc, f"body_crc at {at}")
        rule(not any(data[payload_end:chunk_end]), "padding of a chunk")
        listed = words(f"{pages}I", data, at + 32)
        chunks[at] = chunk_end - at, listed, CODECS[codec], data[list_end:payload_end]
        at = chunk_end
    return chunks


def read_snapshot(data):
    header = read_header(data)
    sections = read_table(data, header)
    regions = read_regions(data, sections, header["memory_bytes"])
    entries = read_entries(data, sections, header["memory_bytes"])
    chunks = read_chunks(data, sections, header["chunk_pages"], header["chunks_id"])

    pages, not_decoded = {}, {}
    for page, (offset, length, slot) in entries.items():
        rule(offset in chunks, "an entry leads to the start of a chunk")
        chunk_length, listed, codec, payload = chunks[offset]
        rule(chunk_length == length, "an entry has its chunk's length")
        rule(slot < len(listed), "an entry's slot is in its chunk")
        if codec == "raw":
            content = payload[PAGE * slot:PAGE * (slot + 1)]
            pages[page] = hashlib.sha256(content).hexdigest()
        else:
            not_decoded.setdefault(codec, []).append(page)
    for offset, (length, listed, _, _) in chunks.items():
        for slot, page in enumerate(listed):
            rule(entries.get(page) == (offset, length, slot), "a listed page's entry leads back")
    rule(header["data_pages"] == len(entries), "data_pages")
    rule(header["stored_pages"] == sum(len(chunk[1]) for chunk in chunks.values()), "stored_pages")
    rule(header["parent_pages"] == 0, "parent_pages")
    rule(header["chunks"] == len(chunks), "chunks")

    states = [
        {"tag": tag, "version": version, "sha256": hashlib.sha256(data[at:at + size]).hexdigest()}
        for kind, tag, version, at, size in sections if kind == STATE
    ]
    rule(len({state["tag"] for state in states}) == len(states), "the tags of states differ")
    at, size = only(sections, METADATA)
    metadata = json.loads(data[at:at + size].decode("utf-8"))
    rule(isinstance(metadata, dict), "metadata is a JSON object")
    return {
        "id": header["id"],
        "chunks_id": header["chunks_id"],
        "memory_bytes": header["memory_bytes"],
        "regions": regions,
        "states": states,
        "metadata": metadata,
        "pages": pages,
        "not_decoded": not_decoded,
    }


def main():
    with open(sys.argv[1], "rb") as file:
        data = file.read()
    try:
        json.dump(read_snapshot(data), sys.stdout)
    except Broken as broken:
        sys.exit(f"{sys.argv[1]}: broken rule: {broken}")
    except struct.error as error:
        sys.exit(f"{sys.argv[1]}: a part is cut off: {error}")


if __name__ == "__main__":
    main()
