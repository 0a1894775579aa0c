"""Vocabularies: what tokens stand for, and models of several vocabularies seen as models of one."""
