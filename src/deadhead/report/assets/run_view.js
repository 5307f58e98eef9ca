'use strict';
// One run on the page: its sections, what is chosen in them, and when each chart is drawn.

// What cannot be seen is drawn when it comes into view, or when the page is printed.
const waiting = new Map();
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) drawWaiting(entry.target);
}, { rootMargin: '200px' });

function drawWaiting(place) {
  const draw = waiting.get(place);
  if (!draw) return;
  waiting.delete(place);
  seen.unobserve(place);
  draw();
}

window.addEventListener('beforeprint', () => [...waiting.keys()].forEach(drawWaiting));

class Figure {
  /**
   * @param {HTMLElement} place what it is drawn into
   * @param {(row: number) => void} pick called with the row of cells that is clicked
   */
  constructor(place, pick = null) {
    Object.assign(this, { place, pick });
    this.plot = element('div', { className: 'plot', role: 'img' });
    this.details = element('details', {}, element('summary', {}, 'As a table'));
    this.scroll = element('div', { className: 'scroll' });
    this.details.append(this.scroll);
    this.details.addEventListener('toggle', () => this.fill());
    this.caption = element('figcaption');
    place.replaceChildren(this.caption, this.plot, this.details);
    new ResizeObserver(() => {
      if (!this.chart || this.plot.clientWidth === this.width) return;
      if (waiting.has(this.place)) this.outline(); else this.paint();
    }).observe(this.plot);
  }

  /** Draw what `make` returns, now or when it comes into view; its room is kept from the beginning, so that nothing moves. */
  draw(make) {
    const made = this.chart?.panels.length ? null : make();
    if (made) {
      this.take(made);
      this.outline();
    }
    waiting.set(this.place, () => {
      if (!made) this.take(make());
      this.paint();
      this.fill();
    });
    seen.unobserve(this.place);
    seen.observe(this.place);
  }

  take(chart) {
    this.chart = chart;
    this.plot.setAttribute('aria-label', chart.say);
    this.caption.textContent = chart.caption || '';
  }

  outline() {
    this.width = this.plot.clientWidth;
    outlineChart(this.plot, this.chart);
  }

  paint() {
    this.width = this.plot.clientWidth;
    drawChart(this.plot, this.chart, this.pick);
  }

  fill() {
    if (this.details.open && this.chart) this.scroll.replaceChildren(numbersTable(...this.chart.table));
  }
}

class RunView {
  constructor(place, run, index) {
    this.index = index;
    this.root = document.getElementById('run-template').content.firstElementChild.cloneNode(true);
    this.body = element('div', { className: 'body' });
    this.body.append(...this.root.querySelectorAll(':scope > section'));
    this.root.append(this.body);
    place.append(this.root);
    this.chosen = { key: '', index: 0 };
    this.frame = null;
    this.figures = Object.fromEntries([...this.root.querySelectorAll('figure')].map((figure) => [figure.dataset.chart,
      new Figure(figure, figure.dataset.chart === 'gates' ? (row) => this.chooseRow(row) : null)]));
    this.map = new HeadMap(this.find('.map'), (layer, head) => this.choose(layer.key, head));
    this.find('.scrub').addEventListener('input', (event) => { this.frame = Number(event.target.value); this.paintMap(); });
    this.find('.shade').addEventListener('change', () => this.paintMap());
    this.find('.size-in').addEventListener('change', () => this.drawSize());
    this.find('.attention-of').addEventListener('change', () => this.drawAttention());
    this.find('.play').addEventListener('click', () => this.play());
    this.update(run);
  }

  find(selector) { return this.root.querySelector(selector); }

  /** Show what is known of the run now. */
  update(run) {
    this.run = run;
    this.facts = run.facts;
    const { facts } = this;
    this.open = new Map(facts.gates.layers.filter((layer) => layer.open).map((layer) => [layer.key, bytes(layer.open)]));
    if (!this.chosen.key && facts.gates.layers.length) this.chosen.key = facts.gates.layers[0].key;
    this.find('.name').textContent = facts.name;
    this.showProgress();
    this.find('.verdict').textContent = facts.verdict;
    this.root.querySelectorAll('.map-section').forEach((section) => { section.hidden = !facts.gates.layers.length; });
    // Runs measure output differences only if they are asked to.
    this.measured = facts.gates.layers.some((layer) => layer.difference.length);
    for (const part of ['.difference-section', '.shade-in']) this.find(part).hidden = !this.measured;
    this.map.unit = facts.unit;
    this.map.build(facts.gates.layers);
    const scrub = this.find('.scrub');
    const last = this.lastFrame();
    scrub.max = last;
    if (this.frame === null || this.frame > last || !this.moved) this.frame = last;
    scrub.value = this.frame;
    this.paintMap();
    this.figures.training.draw(() => trainingChart(this.facts));
    this.figures.gates.draw(() => gatesChart(this.facts, this.open));
    this.figures.costs.draw(() => costsChart(this.facts));
    this.drawSize();
    this.setAttention(run.attention);
    this.drawChosen();
    this.showSamples();
    this.showRecipe();
  }

  showProgress() {
    const { phases, finished, summary } = this.facts;
    const done = phases.reduce((sum, phase) => sum + Math.min(phase.done, phase.steps), 0);
    const all = phases.reduce((sum, phase) => sum + phase.steps, 0);
    const current = phases.find((phase) => phase.done < phase.steps);
    this.find('.progress').value = finished ? 1 : all ? done / all : 0;
    this.find('.state').textContent = finished ? `Finished: ${number.format(done)} steps.`
      : current ? `${current.title}: step ${number.format(current.done)} of ${number.format(current.steps)}.`
        : summary.data ? 'All steps are done; measuring.' : `${number.format(done)} steps.`;
  }

  /** The moments of the slider: every logged step, and the plan where there is one. */
  lastFrame() {
    const steps = this.facts.gates.steps.length;
    return Math.max(0, steps - 1 + (this.facts.gates.layers.some((layer) => layer.kept) ? 1 : 0));
  }

  paintMap() {
    const { steps, layers } = this.facts.gates;
    this.moved = this.frame !== this.lastFrame();
    const isPlan = this.frame >= steps.length && layers.some((layer) => layer.kept);
    const frame = Math.min(this.frame, steps.length - 1);
    const byDifference = this.find('.shade').value === 'difference';
    const largest = Math.max(1e-9, ...layers.flatMap((layer) => layer.difference));
    this.map.paint((layer, index) => {
      const values = this.open.get(layer.key);
      const open = values && frame >= 0 ? values[frame * layer.total + index] / 255 : null;
      const stays = isPlan ? layer.kept === null || layer.kept.includes(index) : open === null || open >= 0.5;
      const difference = layer.difference[index];
      const shade = byDifference ? (difference ?? 0) / largest : isPlan ? Number(stays) : open ?? 1;
      const parts = [isPlan ? (stays ? 'stays' : 'cut') : (stays ? 'open' : 'closed')];
      if (open !== null) parts.push(`open in ${percent.format(open)} of the draws`);
      if (difference !== undefined) parts.push(`output difference ${digits(difference, 3)}`);
      return { shade, stays, final: isPlan && !byDifference, text: parts.join(', ') };
    }, this.chosen);
    const heads = layers.filter((layer) => layer.what === 'head');
    const all = heads.reduce((sum, layer) => sum + layer.total, 0);
    const left = heads.reduce((sum, layer) => sum + (layer.kept ? layer.kept.length : layer.total), 0);
    const units = this.facts.unit === 'kv_group' ? 'key/value groups' : 'heads';
    const moment = isPlan ? `the plan: ${left} of ${all} ${units} stay` : frame < 0 ? 'nothing logged yet' : `step ${number.format(steps[frame])}`;
    this.find('.moment').textContent = moment;
    this.find('.scrub').setAttribute('aria-valuetext', moment);
    this.find('.ramp-text').textContent = byDifference ? `output difference, 0 to ${digits(largest, 3)}` : 'open probability, 0 to 100 %';
    this.sayChosen();
  }

  sayChosen() {
    const cell = this.map.cells.get(this.chosen.key)?.cells[this.chosen.index];
    this.find('.chosen-text').textContent = cell ? `Chosen: ${cell.title}.` : '';
  }

  choose(key, index) {
    this.chosen = { key, index };
    this.paintMap();
    this.drawChosen();
  }

  /** Choose the gate of a row of the chart of all gates. */
  chooseRow(row) {
    for (const layer of this.facts.gates.layers.filter((one) => this.open.has(one.key))) {
      if (row < layer.total) { this.choose(layer.key, row); return; }
      row -= layer.total;
    }
  }

  play() {
    const button = this.find('.play');
    if (this.timer) { clearInterval(this.timer); this.timer = null; } else {
      const last = this.lastFrame();
      if (this.frame >= last) this.frame = 0;
      // The whole course in about six seconds.
      const stride = Math.max(1, Math.round(last / 60));
      this.timer = setInterval(() => {
        this.frame = Math.min(this.frame + stride, this.lastFrame());
        this.find('.scrub').value = this.frame;
        this.paintMap();
        if (this.frame >= this.lastFrame()) this.play();
      }, 100);
    }
    button.textContent = this.timer ? 'stop' : 'play';
    button.setAttribute('aria-pressed', String(Boolean(this.timer)));
  }

  drawChosen() {
    this.figures.layer.draw(() => layerChart(this.facts, this.open, this.chosen));
    if (this.measured) this.figures.difference.draw(() => differenceChart(this.facts, this.chosen));
    this.drawAttention();
  }

  drawSize() {
    this.figures.size.draw(() => sizeChart(this.facts, this.run.others || [], this.find('.size-in').value));
  }

  /** Take in attention patterns, by model; null keeps those there are. */
  setAttention(patterns) {
    if (patterns) this.attention = patterns;
    offer(this.find('.attention-of'), Object.keys(this.attention || {}));
  }

  drawAttention() {
    const patterns = (this.attention || {})[this.find('.attention-of').value];
    this.figures.attention.draw(() => attentionChart(this.facts, patterns, this.chosen));
  }

  showSamples() {
    const samples = this.facts.summary.samples || {};
    this.find('.samples-section').hidden = !Object.keys(samples).length;
    const names = { dense: this.facts.summary.control ? 'dense, trained for as many steps' : 'dense', pruned: 'pruned and fine-tuned' };
    this.find('.samples').replaceChildren(...Object.entries(samples).map(([name, text]) => element('div', {},
      element('span', { className: 'caption' }, names[name] || name), element('pre', {}, text))));
  }

  showRecipe() {
    const { recipe, summary } = this.facts;
    this.find('.recipe-section').hidden = !recipe && !summary.versions;
    this.find('.recipe').textContent = recipe;
    const facts = { ...summary.versions };
    if (summary.data) facts.text = `${summary.data.source}, ${number.format(summary.data.tokens)} tokens, SHA-256 ${summary.data.sha256}`;
    if (summary.processes) facts.processes = summary.processes;
    this.find('.versions').replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [element('dt', {}, name), element('dd', {}, String(value))]));
  }
}
