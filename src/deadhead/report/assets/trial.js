'use strict';
// Try it: heads switched off and on in a model that the server holds.

class Trial {
  constructor(view, server) {
    Object.assign(this, { view, server, kept: new Map(), pending: false });
    this.map = new HeadMap(view.find('.trial-map'), (layer, index) => this.toggle(layer, index), true);
    view.find('.trial-model').addEventListener('change', () => this.open(view.find('.trial-model').value));
    view.find('.trial-all').addEventListener('click', () => this.keep((layer) => layer.present));
    view.find('.trial-plan').addEventListener('click', () => this.keep((layer) => layer.planned));
    view.find('.trial-save').addEventListener('click', () => this.save());
    view.find('.trial-prompt').addEventListener('change', () => this.measure());
  }

  /** Offer the models there are now; of a run that goes on there come to be more. */
  async refresh(run) {
    const select = this.view.find('.trial-model');
    offer(select, run.models);
    if (this.name || !run.models.length) return;
    if (this.view.find('.trial').hidden) this.view.find('.trial-prompt').value = run.prompt;
    this.view.find('.trial').hidden = false;
    await this.open(select.value);
  }

  async open(name) {
    this.say('loading the model …');
    try {
      this.model = await this.server.ask(`api/trial?run=${this.view.index}&model=${encodeURIComponent(name)}`);
    } catch (error) { this.say(error.message); return; }
    this.name = name;
    this.map.unit = this.model.unit;
    this.map.build(this.model.layers);
    this.view.find('.trial-plan').disabled = !this.model.layers.some((layer) => layer.planned);
    this.keep((layer) => layer.planned || layer.present);
  }

  keep(choose) {
    this.kept = new Map(this.model.layers.map((layer) => [layer.key, new Set(choose(layer) || layer.present)]));
    this.paint();
    this.measure();
  }

  toggle(layer, index) {
    const kept = this.kept.get(layer.key);
    if (!kept.delete(index)) kept.add(index);
    this.paint();
    this.measure();
  }

  paint() {
    this.map.paint((layer, index) => {
      const stays = this.kept.get(layer.key).has(index);
      const there = layer.present.includes(index);
      return { shade: Number(stays), stays, final: true, off: !there, text: !there ? 'cut before' : stays ? 'on' : 'off' };
    });
  }

  say(text) { this.view.find('.trial-result').textContent = text; }

  /** Measure what is clicked now; clicks that come meanwhile are measured together afterwards. */
  async measure() {
    if (this.pending) { this.again = true; return; }
    this.pending = true;
    this.view.find('.trial').classList.add('busy');
    do {
      this.again = false;
      const kept = Object.fromEntries([...this.kept].map(([key, units]) => [key, [...units].sort((a, b) => a - b)]));
      try {
        const found = await this.server.post('api/trial', { run: this.view.index, model: this.name, kept, prompt: this.view.find('.trial-prompt').value });
        if (this.again) continue;
        this.plan = found.plan;
        this.say(`perplexity ${digits(found.perplexity)} (${digits(found.whole)} with all heads on), ${found.on} of ${found.total} on`);
        this.view.find('.trial-continuation').textContent = found.continuation;
        this.view.find('.trial-saved').textContent = '';
      } catch (error) { this.say(error.message); }
    } while (this.again);
    this.pending = false;
    this.view.find('.trial').classList.remove('busy');
  }

  save() {
    if (!this.plan) return;
    const blob = new Blob([`${JSON.stringify(this.plan, null, 2)}\n`], { type: 'application/json' });
    const link = element('a', { href: URL.createObjectURL(blob), download: 'head_plan.json' });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    this.view.find('.trial-saved').textContent = `Saved as head_plan.json. Cut the model by it: deadhead cut ${this.model.folder} --plan head_plan.json --out …`;
  }
}
