VENV   := .venv
PYTHON ?= python3
RUN    := $(VENV)/bin
DEMO   := build/demo
TINY   := --clip_grad 1 --aa none
DOTA   := --model vit_tiny_patch16_64 --data_set DoTA --data_path $(DEMO)/data --num_workers 1
LAUNCH := OMP_NUM_THREADS=1 $(RUN)/torchrun --standalone --nproc_per_node=2

.PHONY: demo test lint clean

# $(call part,name,how long on two quiet cores,what happens): say what begins, and note when.
define part
@printf '\n=== %s, about %s\n    %s\n' '$(1)' '$(2)' '$(3)'
@printf '%s %s\n' "$$(date +%s)" '$(1)' >> $(DEMO)/times.txt
endef

# The whole story on rendered roads: unlabelled videos -> DAPT of a tiny masked autoencoder -> fine-tuning of its encoder
# -> evaluation on held-out clips, beside an untrained twin -> risk curves of two of them. Learning rates are high because
# the model is tiny and new.
demo: $(VENV)/installed
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	@echo 'From unlabelled videos to the risk of a new one, in six parts: 3 to 4 minutes on two quiet CPU cores.'
	$(call part,1/6 rendering,25 s,Roads with and without crashes: 60 videos without labels; 200 labelled clips to train on; 32 to test on.)
	$(RUN)/python -m datasets.tools.synthetic $(DEMO)/data --train 200 --val 32 --videos 60
	$(call part,2/6 DAPT,40 s,A masked autoencoder fills in what is hidden of the videos without labels: two processes share its batches.)
	$(LAUNCH) run_dapt.py $(TINY) --num_workers 1 --model pretrain_videomae_tiny_patch16_64 --data_set videos \
	    --data_path $(DEMO)/data/videos --output_dir $(DEMO)/dapt --epochs 4 --nb_samples_per_epoch 2048 \
	    --sampling_rate 3 --total_batch_size 64 --lr 4e-3 --min_lr 1e-4
	$(call part,3/6 fine-tuning,70 s,Its encoder learns the risk of each frame from the labelled clips and is tested after each epoch.)
	$(LAUNCH) run_finetune.py $(TINY) $(DOTA) --output_dir $(DEMO)/finetune --finetune $(DEMO)/dapt/checkpoint-3.pth \
	    --epochs 7 --warmup_epochs 1 --nb_samples_per_epoch 4096 --total_batch_size 32 --lr 8e-3 --layer_decay 0.8 \
	    --drop_path 0 --reprob 0 --print_freq 64
	$(call part,4/6 evaluation untrained,20 s,The same model with random weights scores the test clips: it should do no better than chance.)
	$(RUN)/python run_finetune.py --eval $(DOTA) --output_dir $(DEMO)/untrained
	$(call part,5/6 evaluation fine-tuned,15 s,The fine-tuned one scores them: predictions.csv and metrics.json and plots/.)
	$(RUN)/python run_finetune.py --eval $(DOTA) --output_dir $(DEMO)/fine-tuned \
	    --finetune $(DEMO)/finetune/checkpoint-6.pth
	$(call part,6/6 prediction,5 s,Two clips it has not seen get a risk curve and an overlay and a report.)
	$(RUN)/python run_predict.py $(DEMO)/data/frames/syntheticva_00000[01] --assume_fps 10 --num_workers 1 \
	    --weights $(DEMO)/finetune/checkpoint-6.pth --output_dir $(DEMO)/predicted
	@$(RUN)/python tests/check_demo.py $(DEMO)

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n auto --maxprocesses 4

lint: $(VENV)/installed
	$(RUN)/ruff check
	$(RUN)/ruff format --check

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf build
