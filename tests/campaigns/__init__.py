"""Campaigns: builds ended at random moments, bytes flipped, builds by the hundred. The suite runs a few of each.

python -m tests.campaigns.ended --kills 200 --full 50 --interrupts 20 --work /tmp/ended
python -m tests.campaigns.flipped --outputs 100 --inputs 100 --work /tmp/flipped
python -m tests.campaigns.soak --builds 500 --work /tmp/soak
"""
