"""Options of the detector's train.py for a run of seconds."""

SMALL_RUN = (
    "--preset shapes-easy --hidden-dim 32 --num-heads 2 --num-encoder-layers 1 "
    "--feedforward-dim 32 --num-queries 10 --batch-size 4 --log-every 1 --device cpu"
)
