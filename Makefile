VENV   := .venv
PYTHON ?= python3
RUN    := $(VENV)/bin
DEMO   := build/demo

.PHONY: demo test lint clean

# Render driving clips with accidents, train a tiny Video ViT on them with torchrun, evaluate it and its untrained twin.
DATA := --data_set DoTA --data_path $(DEMO)/data --model vit_tiny_patch16_64 --num_workers 1
demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(RUN)/python -m datasets.synthetic $(DEMO)/data --train 200 --val 32
	OMP_NUM_THREADS=1 $(RUN)/torchrun --standalone --nproc_per_node=2 run_finetune.py $(DATA) --output_dir $(DEMO)/finetune \
	    --total_batch_size 32 --lr 1.6e-2 --epochs 10 --warmup_epochs 1 --nb_samples_per_epoch 4096 \
	    --layer_decay 0.9 --drop_path 0 --clip_grad 1 --aa none --reprob 0 --print_freq 32
	$(RUN)/python run_finetune.py --eval $(DATA) --output_dir $(DEMO)/untrained
	$(RUN)/python run_finetune.py --eval $(DATA) --output_dir $(DEMO)/trained \
	    --finetune $(DEMO)/finetune/checkpoint-best_auroc.pth
	@$(RUN)/python -c "import json; \
	    show = lambda run: '  '.join(f'{k} {100 * json.load(open(f\"$(DEMO)/{run}/metrics.json\"))[v]:.1f}' \
	        for k, v in (('AUC_ROC', 'auroc'), ('AUC_MCC', 'auc_mcc'))); \
	    print('untrained  ', show('untrained')); print('fine-tuned ', show('trained')); \
	    print('plots:      $(DEMO)/trained/plots/   TensorBoard: $(RUN)/tensorboard --logdir $(DEMO)/finetune')"

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
