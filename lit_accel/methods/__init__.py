"""The methods, one package each: a functional core without Lightning, a callback, a mixin and a card."""
