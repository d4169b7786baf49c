"""The files beside the program: its header, an example that calls it, and a Makefile."""

from __future__ import annotations

from collections.abc import Iterator

from qgraph.codegen import c_text
from qgraph.codegen.c_graph import Port
from qgraph.codegen.c_program import Program

__all__ = ["example_text", "header_text", "makefile_text"]


def header_text(program: Program) -> str:
    """Return the header: the function, and for each input and output its type, sizes and scale."""
    upper = program.name.upper()
    lines = [
        f"#ifndef {upper}_H",
        f"#define {upper}_H",
        "",
        "#include <stdint.h>",
        "",
        "/*",
        " * real value = (integer - ZERO_POINT) * SCALE; tensors without a scale are plain integers.",
        " * Tensors are laid out row by row; inputs and outputs must not overlap.",
        " */",
        *_describe(program),
        "",
        "/* Bytes of constants, and of memory for what lies between the inputs and the outputs. */",
        f"#define {upper}_FLASH_BYTES {program.constants.nbytes}",
        f"#define {upper}_RAM_BYTES {program.arena}",
        "",
        "/* Runs the model once. Not reentrant: the memory in between is static. */",
        f"{program.signature()};",
        "",
        "#endif",
    ]
    return "\n".join(lines) + "\n"


def _describe(program: Program) -> Iterator[str]:
    edges = [*zip(program.inputs, program.graph.inputs, strict=True)]
    edges += zip(program.outputs, program.graph.outputs, strict=True)
    for name, port in edges:
        macro = f"{program.name}_{name}".upper()
        yield ""
        yield f"/* {name}: '{c_text.comment(port.source)}', {c_text.C_TYPES[port.dtype]}{list(port.shape)} */"
        yield f"#define {macro}_TYPE {c_text.C_TYPES[port.dtype]}"
        yield f"#define {macro}_RANK {len(port.shape)}"
        yield f"#define {macro}_SHAPE {{{', '.join(map(str, port.shape or (1,)))}}}"
        yield f"#define {macro}_SIZE {port.nbytes // port.dtype.itemsize}"
        if port.scale is not None:
            yield f"#define {macro}_SCALE {port.scale!r}"
            yield f"#define {macro}_ZERO_POINT {c_text.literal(port.zero_point, port.dtype)}"


def example_text(program: Program) -> str:
    """Return a program that runs the model on raw tensors from a file, or on zeros."""
    inputs, outputs = program.graph.inputs, program.graph.outputs
    reads = [f"        read_all(file, {name}, sizeof {name});" for name in program.inputs]
    writes = [f"        write_all(file, {name}, sizeof {name});" for name in program.outputs]
    sums = [f"    sum = checksum(sum, {name}, sizeof {name});" for name in program.outputs]
    call = ", ".join([*program.inputs, *program.outputs])
    return _EXAMPLE.format(
        name=program.name,
        tensors="\n".join([*_tensors(program, program.inputs, inputs), *_tensors(program, program.outputs, outputs)]),
        reads="\n".join(reads),
        writes="\n".join(writes),
        sums="\n".join(sums),
        call=call,
    )


def _tensors(program: Program, names: list[str], ports: list[Port]) -> Iterator[str]:
    for name, port in zip(names, ports, strict=True):
        yield f"static {c_text.C_TYPES[port.dtype]} {name}[{f'{program.name}_{name}'.upper()}_SIZE];"


def makefile_text(program: Program) -> str:
    """Return a Makefile for the example."""
    return _MAKEFILE.format(name=program.name)


_EXAMPLE = """\
/*
 * Runs the model on raw tensors.
 *
 *     example INPUT OUTPUT    reads all inputs, one behind the other, from INPUT and writes all outputs to OUTPUT
 *     example                 runs on zeros and prints a checksum of the outputs
 */
#include "{name}.h"

#include <stdio.h>
#include <stdlib.h>

{tensors}

static FILE *open_file(const char *path, const char *mode)
{{
    FILE *file = fopen(path, mode);
    if (file == NULL) {{
        fprintf(stderr, "cannot open %s\\n", path);
        exit(2);
    }}
    return file;
}}

static void read_all(FILE *file, void *data, size_t size)
{{
    if (fread(data, 1, size, file) != size) {{
        fprintf(stderr, "the input file is too short\\n");
        exit(2);
    }}
}}

static void write_all(FILE *file, const void *data, size_t size)
{{
    if (fwrite(data, 1, size, file) != size) {{
        fprintf(stderr, "the output file cannot be written\\n");
        exit(2);
    }}
}}

/* FNV-1a over the bytes. */
static uint32_t checksum(uint32_t sum, const void *data, size_t size)
{{
    const uint8_t *bytes = data;
    for (size_t i = 0; i < size; ++i) {{
        sum = (sum ^ bytes[i]) * UINT32_C(16777619);
    }}
    return sum;
}}

int main(int argc, char **argv)
{{
    uint32_t sum = UINT32_C(2166136261);
    if (argc != 1 && argc != 3) {{
        fprintf(stderr, "usage: %s [INPUT OUTPUT]\\n", argv[0]);
        return 2;
    }}
    if (argc == 3) {{
        FILE *file = open_file(argv[1], "rb");
{reads}
        fclose(file);
    }}
    {name}_run({call});
{sums}
    if (argc == 3) {{
        FILE *file = open_file(argv[2], "wb");
{writes}
        if (fclose(file) != 0) {{
            fprintf(stderr, "the output file cannot be written\\n");
            return 2;
        }}
    }} else {{
        printf("checksum of the outputs for zeros: %08lx\\n", (unsigned long)sum);
    }}
    return 0;
}}
"""

_MAKEFILE = """\
CC ?= gcc
CFLAGS ?= -O2
# Tensors of different types take turns in the same memory.
CFLAGS += -std=c99 -Wall -Wextra -Werror -fno-strict-aliasing

example: main.c {name}.c {name}.h {name}_weights.h
\t$(CC) $(CFLAGS) -o $@ main.c {name}.c

size: {name}.o
\tsize {name}.o

{name}.o: {name}.c {name}.h {name}_weights.h
\t$(CC) $(CFLAGS) -c -o $@ {name}.c

clean:
\trm -f example {name}.o

.PHONY: clean size
"""
