"""Results on disk: made beside their place, continued, published whole; are they still what was asked for?"""
