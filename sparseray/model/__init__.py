"""The network: attention, DeepSeekMoE, DSE memory; experts and memory come in through two seams."""
