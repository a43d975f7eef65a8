"""Linear attention: feature maps, key-value states, and gradients.

Feature maps that estimate softmax weights are methods of softmax attention too.
"""
