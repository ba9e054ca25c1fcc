# Placeholder head; the full file is written by the packaging part.
PY := .venv/bin/python
SITE := $(shell $(PY) -c "import site; print(site.getsitepackages()[0])")

.PHONY: ext links
links:
	mkdir -p $(SITE)/zerokl
	for room in rollout weight_sync kernels integrations; do ln -sfn $(CURDIR)/$$room $(SITE)/zerokl/$$room; done

ext: links
	PATH=$(abspath .venv/bin):$$PATH cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(PY)) -DCMAKE_MAKE_PROGRAM=$(abspath .venv/bin/ninja) > /dev/null
	PATH=$(abspath .venv/bin):$$PATH cmake --build build/dev
	cp build/dev/_cpu.*.so kernels/cpu/
