VENV   := .venv
PYTHON ?= python3
RUN    := $(VENV)/bin
DEMO   := build/demo
COMMON := --model vit_tiny_patch16_64 --data_set DoTA --data_path $(DEMO)/data --num_workers 1

.PHONY: demo test lint clean

# Render driving clips with accidents, train a tiny Video ViT on them from scratch (hence the high learning rate and
# mild layer decay) with torchrun, evaluate its last epoch and an untrained twin on the held-out clips.
demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(RUN)/python -m datasets.synthetic $(DEMO)/data --train 200 --val 32
	OMP_NUM_THREADS=1 $(RUN)/torchrun --standalone --nproc_per_node=2 run_finetune.py $(COMMON) \
	    --output_dir $(DEMO)/finetune --epochs 10 --warmup_epochs 1 --nb_samples_per_epoch 4096 \
	    --total_batch_size 32 --lr 1.6e-2 --layer_decay 0.9 --drop_path 0 --clip_grad 1 --aa none --reprob 0 \
	    --print_freq 64
	$(RUN)/python run_finetune.py --eval $(COMMON) --output_dir $(DEMO)/untrained
	$(RUN)/python run_finetune.py --eval $(COMMON) --output_dir $(DEMO)/fine-tuned \
	    --finetune $(DEMO)/finetune/checkpoint-9.pth
	@$(RUN)/python tests/check_demo.py $(DEMO)

test: $(VENV)/installed
	$(RUN)/python -m pytest

lint: $(VENV)/installed
	$(RUN)/ruff check
	$(RUN)/ruff format --check

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf build
