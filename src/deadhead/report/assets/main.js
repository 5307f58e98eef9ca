'use strict';
// Begin: build the runs, explain the terms, and, where a server gave the page, ask it for news.

const page = JSON.parse(document.getElementById('data').textContent);
const views = page.runs.map((run, index) => new RunView(document.getElementById('runs'), run, index));

// Explanations on hover, on focus and on touch.
const tip = document.getElementById('tip');
for (const term of document.querySelectorAll('[data-term]')) {
  term.tabIndex = 0;
  term.setAttribute('aria-describedby', `term-${term.dataset.term}`);
}
function explain(event) {
  const term = event.target.closest?.('[data-term]');
  tip.hidden = !term;
  if (!term) return;
  tip.textContent = document.getElementById(`term-${term.dataset.term}`).textContent;
  const place = term.getBoundingClientRect();
  tip.style.top = `${window.scrollY + place.bottom + 6}px`;
  tip.style.left = `${window.scrollX + Math.max(8, Math.min(place.left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
}
for (const kind of ['mouseover', 'focusin', 'click']) document.addEventListener(kind, explain);
document.addEventListener('keydown', (event) => { if (event.key === 'Escape') tip.hidden = true; });

class Server {
  constructor() {
    this.token = new URLSearchParams(location.search).get('token') || '';
    this.marks = new Map();
  }

  async ask(path, options = {}) {
    const response = await fetch(path, { ...options, headers: { ...options.headers, Authorization: `Bearer ${this.token}` } });
    if (response.status === 304) return null;
    const found = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
    if (!response.ok) throw Object.assign(new Error(found.error), { answered: true });
    const mark = response.headers.get('ETag');
    if (mark) this.marks.set(path, mark);
    return found;
  }

  /** What is at `path` if it has changed since the last time, else null. */
  news(path) { return this.ask(path, this.marks.has(path) ? { headers: { 'If-None-Match': this.marks.get(path) } } : {}); }

  post(path, value) {
    return this.ask(path, { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(value) });
  }
}

/** Keep a run up to date: its facts every second, and the models to try once there are any. */
async function follow(view, server) {
  const connection = document.getElementById('connection');
  const trial = new Trial(view, server);
  let wait = 1000;
  for (;;) {
    try {
      const run = await server.news(`api/run?run=${view.index}`);
      if (run) view.update(run);
      await trial.refresh(view.run);
      connection.textContent = 'live';
      wait = 1000;
    } catch (error) {
      connection.textContent = error.answered ? error.message : 'The server does not answer; trying again …';
      wait = Math.min(wait * 2, 15000);
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

async function readSentence(view, server) {
  const sentence = view.find('.sentence').value;
  try {
    view.setAttention(await server.ask(`api/attention?run=${view.index}&sentence=${encodeURIComponent(sentence)}`));
    view.drawAttention();
  } catch (error) { document.getElementById('connection').textContent = error.message; }
}

if (page.live) {
  const server = new Server();
  for (const view of views) {
    view.find('.ask').hidden = false;
    view.find('.sentence').value = page.runs[view.index].sentence;
    view.find('.ask').addEventListener('submit', (event) => { event.preventDefault(); readSentence(view, server); });
    follow(view, server);
  }
}
document.documentElement.dataset.ready = '';
