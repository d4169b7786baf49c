"""Running Python on this processor as if it had fewer instructions, so that kernels for lesser ones can be looked at.

Libraries that choose kernels ask the CPUID instruction what there is. Where Linux lets a process have that instruction
faulted (arch_prctl ARCH_SET_CPUID; Intel processors since 2012), a handler answers in its place with bits left out.
What runs then is what a lesser processor would run, at the speed of this one. Source: Linux, arch_prctl(2).
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qgraph.capabilities import PROCESSORS, ByteProduct
from qgraph.runtime.processor import product_processor

__all__ = ["can_hide", "processors_here", "products_of", "run_on"]

_HANDLER = r"""
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(n) (1u << (n))

static int without_avx512;

static void answer(int signal_number, siginfo_t *info, void *context) {
  greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *at = (const unsigned char *)r[REG_RIP];
  if (at[0] != 0x0f || at[1] != 0xa2) { signal(signal_number, SIG_DFL); return; }
  unsigned a, b, c, d, leaf = r[REG_RAX], part = r[REG_RCX];
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
  __cpuid_count(leaf, part, a, b, c, d);
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
  if (leaf == 7 && part == 0) {
    c &= ~BIT(11);                         /* AVX512_VNNI */
    d &= ~(BIT(22) | BIT(24) | BIT(25));   /* AMX */
    if (without_avx512) {
      b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
      c &= ~(BIT(1) | BIT(6) | BIT(12) | BIT(14));
      d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(23));
    }
  }
  if (leaf == 7 && part == 1) {
    a &= ~(BIT(4) | BIT(5));               /* AVX_VNNI, AVX512_BF16 */
    d &= ~(BIT(4) | BIT(5) | BIT(10));     /* AVX_VNNI_INT8, AVX_NE_CONVERT, AVX_VNNI_INT16 */
  }
  r[REG_RAX] = a; r[REG_RBX] = b; r[REG_RCX] = c; r[REG_RDX] = d; r[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void) {
  const char *processor = getenv("LESSER_PROCESSOR");
  if (!processor) return;
  without_avx512 = !strcmp(processor, "avx2");
  struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGSEGV, &action, 0);
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) _exit(77);
}
"""
_PRODUCTS = """
import dataclasses, json, sys
from qgraph.runtime.product_probes import found_products
print(json.dumps([dataclasses.asdict(one) for one in found_products(sys.argv[1])]))
"""


def can_hide() -> bool:
    """Tell whether instructions can be hidden here: Linux on such a processor, and a C compiler."""
    if sys.platform != "linux" or not product_processor() or shutil.which("cc") is None:
        return False
    return run_on("avx2", ["-c", ""]).returncode == 0


def run_on(processor: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that sees one of PROCESSORS ("vnni": this one as it is).

    Args:
        processor: no better than this one.
        arguments: of Python.
    """
    environment = dict(os.environ)
    if processor != product_processor():
        environment |= {"LD_PRELOAD": str(_library()), "LESSER_PROCESSOR": processor}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@functools.cache
def _library() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="qgraph-"))
    source, library = folder / "lesser.c", folder / "lesser.so"
    source.write_text(_HANDLER, encoding="utf-8")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


def products_of(processor: str) -> Iterator[ByteProduct]:
    """Yield how ONNX Runtime's kernels add products of bytes on a processor."""
    done = run_on(processor, ["-c", _PRODUCTS, processor])
    if done.returncode:
        raise RuntimeError(done.stderr)
    for one in json.loads(done.stdout):
        lists = {key: tuple(one[key]) for key in ("weights", "when", "saturates")}
        yield ByteProduct(**{**one, **lists})


def processors_here() -> list[str]:
    """Return those of PROCESSORS that can be had here, the least first."""
    here = product_processor()
    if not here:
        return []
    return list(PROCESSORS[: PROCESSORS.index(here) + 1]) if can_hide() else [here]
