# Two commands, each of which does all of its own set-up on a machine with Python 3.11 or 3.12:
#   make demo    compress the bundled model; the artifact is left in build/demo, the report in build/demo.run/report.html
#   make test    install what the tests need and run them
# A third opens exports in vLLM, on the CPU:
#   make test-vllm

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
VLLM := .venv-vllm
PIP := $(VENV)/bin/pip --disable-pip-version-check

.PHONY: demo test test-vllm clean

demo: $(VENV)/.installed-all
	$(VENV)/bin/qpruner demo --output build/demo

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n 2

test-vllm: $(VENV)/.installed-test $(VLLM)/.installed
	QPRUNER_VLLM=$(abspath $(VLLM))/bin/python $(VENV)/bin/python -m pytest -m vllm -n 2

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "qpruner needs Python 3.11 or 3.12; name one: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first and by its pinned version, so that no other package's looser range chooses a build.
$(VENV)/.installed-%: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install -q "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -q -c constraints.txt -e '.[$*]'
	touch $@

# All pins by name: vLLM itself asks for packages that only images and sound need.
$(VLLM)/.installed: constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip --disable-pip-version-check install -q "$$(grep '^torch==' constraints.txt)"
	$(VLLM)/bin/pip --disable-pip-version-check install -q --no-deps -r constraints-vllm.txt
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build
