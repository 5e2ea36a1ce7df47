"""Scores of generated audio: Fréchet audio distance, KL over labels, CLAP score, tag agreement.

python -m launch.evaluate --generated wavs --reference real_audio --out scores
python -m launch.evaluate --checkpoint RUN --prompts musiccaps.csv --reference real_audio \\
    --out scores

What comes out is a table, and a receipt of everything it depends on: OUT/receipt.json.
"""
