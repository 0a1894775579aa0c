"""Campaigns: builds ended at random moments, bytes flipped, other machines, builds by the hundred; some run as tests.

python -m tests.campaigns.ended --kills 200 --full 50 --interrupts 20 --work /tmp/ended
python -m tests.campaigns.flipped --outputs 100 --inputs 100 --work /tmp/flipped
python -m tests.campaigns.same_bits --work /tmp/bits
python -m tests.campaigns.soak --builds 500 --work /tmp/soak
"""
