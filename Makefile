# Plain POSIX make. Everything happens in $(VENV), which is made when it is not there; remove it to start afresh.
#
#   make demo     install, compile a shipped model to 8-bit integers and print what that changed
#   make test     install with the test tools, then lint, types and every test
#   make bench    measure against the other quantizers (benchmarks/RESULTS.md, ACCURACY.md, LOW_BIT.md)
#   make format   mend what the linter can mend by itself
#   make clean    remove everything that was made

.POSIX:
.PHONY: all demo test bench format clean install-demo install-dev

VENV = .venv
BIN = $(VENV)/bin
DEMO = build/demo
CHECKED = qgraph passes targets models tests benchmarks
# The first of these that is 3.11 or newer and can make a virtual environment; constraints.txt was tested on 3.11.
PYTHON = python3.11
PYTHONS = $(PYTHON) python3.12 python3.13 python3 python

all: test

$(BIN)/python:
	@for python in $(PYTHONS); do \
	    if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        echo "$$python -m venv $(VENV)"; \
	        exec "$$python" -m venv --clear $(VENV); \
	    fi; \
	done; \
	echo 'qgraph needs Python 3.11 or newer; name yours: make PYTHON=/path/to/python3.11' >&2; exit 1

install-demo: $(BIN)/python
	@.ci/install $(VENV) demo

install-dev: $(BIN)/python
	@.ci/install $(VENV) dev

demo: install-demo
	@mkdir -p $(DEMO)
	@$(BIN)/python -P -m qgraph.models digits_cnn -o $(DEMO) >/dev/null
	$(BIN)/qgraph compile $(DEMO)/digits_cnn.onnx --target cpu-int8 --calib $(DEMO)/digits_cnn_calib.npz \
	    --verify-data $(DEMO)/digits_cnn_heldout.npz -o $(DEMO)/digits_cnn.cpu-int8 --force

# The types are those of the installed package, so mypy must not find the checkout's own folders first.
test: install-dev
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	@mkdir -p build
	mypy=$$(cd $(BIN) && pwd)/mypy; cd build && "$$mypy" --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p qgraph
	$(BIN)/pytest -n 2 --dist worksteal

bench: install-dev
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/accuracy.py
	@mkdir -p build/low_bit
	$(BIN)/python benchmarks/language.py -o build/low_bit/language.json
	$(BIN)/python benchmarks/rtn.py --large -o build/low_bit/rtn.json
	$(BIN)/python benchmarks/decode.py -o build/low_bit/decode.json
	-$(BIN)/python benchmarks/gptq.py -o build/low_bit/gptq.json
	$(BIN)/python benchmarks/report_low_bit.py build/low_bit

format: install-dev
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

clean:
	rm -rf build dist *.egg-info .venv .venv-ci .mypy_cache .ruff_cache .pytest_cache .hypothesis
